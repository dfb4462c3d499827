"""From the command to its first optimizer step: a bound on CPU seconds, and what may not be imported on the way.

The figures are those of ``benchmarks/startup.py``; the bound here is generous, because a model of any size and any
machine must keep it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tinyrun import arguments, prepare

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "startup.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
BARE = "import torch, transformers, transformers.modeling_utils, time; print(time.process_time())"
MORE_CPU_SECONDS = 2.5
NOT_ASKED_FOR = {"bitsandbytes", "datasets", "pandas", "scipy", "sklearn", "matplotlib", "pyarrow", "wandb", "peft"}


def start(folder: Path) -> dict[str, dict[str, float]]:
    marks = folder / "marks.json"
    words = [*arguments(folder, training__max_train_steps=1)[1:], "--overwrite"]
    command = [sys.executable, str(SCRIPT), "--child", str(marks), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert marks.exists(), done.stderr
    return json.loads(marks.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """A second start, with the rows in the cache."""
    folder = prepare(tmp_path_factory.mktemp("startup"))
    start(folder)
    return start(folder)


def test_the_first_step_begins_soon_after_the_imports(started: dict[str, dict[str, float]]) -> None:
    bare = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert started["begins"]["cpu"] < float(bare.stdout) + MORE_CPU_SECONDS
    assert started["begins"]["cpu"] < started["ends"]["cpu"]


def test_nothing_is_imported_that_nobody_asked_for(started: dict[str, list[str]]) -> None:
    assert not NOT_ASKED_FOR & set(started["modules"])
    assert {"torch", "transformers"} <= set(started["modules"]), "the list is the real one"
