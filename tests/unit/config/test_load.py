"""What a preset means, where each value came from, and that nothing unknown or bent passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from preset_tree import full_tree, misspellings, walk

from eulerforge.config.emit import toml_text
from eulerforge.config.phase_checks import best_problems
from eulerforge.errors import ConfigError

TOML = """\
model_name = "m"

[injection]
strategy = "dense_lora"
lora_r = 48
target_keywords = ["gate_proj"]
attn_lora = { enabled = true, keywords = ["q_proj", "v_proj"] }

[training]
lr = 1.0e-5
phases = [{ step = 0, trainable = ["lora"] }]
"""
YAML = """\
model_name: m
injection:
  strategy: dense_lora
  lora_r: 48
  target_keywords: [gate_proj]
  attn_lora:
    enabled: true
    keywords: [q_proj, v_proj]
training:
  lr: 1e-5
  phases:
    - step: 0
      trainable: ["lora"]
"""


def problems(load: Any, text: str, *sets: str, suffix: str = ".toml") -> list[Any]:
    with pytest.raises(ConfigError) as caught:
        load(text, *sets, suffix=suffix)
    return list(caught.value.problems)


def test_toml_and_yaml_of_the_same_content_are_equal(load: Any) -> None:
    assert load(TOML).run == load(YAML, suffix=".yml").run


def test_every_value_knows_where_it_came_from(load: Any, tmp_path: Path) -> None:
    loaded = load(TOML, "training.batch_size=2")
    assert loaded.run.training.batch_size == 2
    assert loaded.source("training.batch_size") == "--set"
    assert loaded.source("training.lr") == f"{tmp_path}/preset.toml:10"
    assert loaded.source("injection.attn_lora.enabled") == f"{tmp_path}/preset.toml:7"
    assert loaded.source("training.weight_decay") == "default"
    assert f"lr = 1e-05  # {tmp_path}/preset.toml:10" in loaded.to_toml()


def test_the_resolved_config_reads_back_as_the_same_run(load: Any) -> None:
    first = load(TOML, "data.path=rows.jsonl", "data.schema={prompt='question'}", "seed=7")
    assert load(first.to_toml(comments=False)).run == first.run


def test_all_problems_are_reported_at_once_with_their_lines(load: Any, tmp_path: Path) -> None:
    text = 'model_nme = "m"\nlr = 3\n[training]\nbatch_size = 4.7\n[data]\nformat = "rw"\n'
    found = {problem.key: problem for problem in problems(load, text, "training.lr=true")}
    assert set(found) == {"model_nme", "lr", "training.batch_size", "data.format", "training.lr"}
    assert found["model_nme"].source == f"{tmp_path}/preset.toml:1"
    assert found["lr"].hint == "did you mean training.lr?"
    assert found["training.batch_size"].source == f"{tmp_path}/preset.toml:4"
    assert found["training.lr"].source == "--set"


@pytest.mark.parametrize("suffix", [".toml", ".yml"])
def test_every_key_misspelt_by_one_letter_is_refused_with_the_right_name_and_line(load: Any, suffix: str) -> None:
    tree = full_tree()
    tried = 0
    for path in walk(tree):
        siblings = {name for *parent, name in walk(tree) if parent == list(path[:-1])}
        for wrong in misspellings(path[-1], siblings):
            text, line = rendered(tree, path, wrong, suffix)
            bad = ".".join((*path[:-1], wrong))
            hits = [problem for problem in problems(load, text, suffix=suffix) if problem.key == bad]
            assert hits, f"{bad} was accepted"
            assert hits[0].hint == f"did you mean {'.'.join(path)}?"
            assert hits[0].source.endswith(f":{line}")
            tried += 1
    assert tried > 200


def rendered(tree: dict[str, Any], path: tuple[str, ...], wrong: str, suffix: str) -> tuple[str, int]:
    """The whole tree as text with one key misspelt, and the line on which the wrong key stands."""

    def renamed(node: dict[str, Any], rest: tuple[str, ...]) -> dict[str, Any]:
        first, *others = rest
        return {
            (wrong if name == first and not others else name): (
                renamed(value, tuple(others)) if name == first and others else value
            )
            for name, value in node.items()
        }

    broken = renamed(tree, path)
    text = toml_text(broken) if suffix == ".toml" else yaml.safe_dump(broken, sort_keys=False)
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        word = line.strip().lstrip("[").split("=")[0].split(":")[0].split("]")[0].strip().rpartition(".")[2]
        if word == wrong and in_section(lines[:number], path, suffix):
            return text, number
    raise AssertionError(f"{wrong} is not in the text")


def in_section(lines: list[str], path: tuple[str, ...], suffix: str) -> bool:
    """Whether the last of ``lines`` belongs to the table that ``path`` names; the top has no heading."""
    if len(path) == 1:
        return True
    if suffix == ".toml":
        headers = [line.strip("[]") for line in lines if line.startswith("[")]
        return bool(headers) and headers[-1].split(".")[: len(path) - 1] == list(path[:-1])
    indent = len(lines[-1]) - len(lines[-1].lstrip())
    parents = [
        line for line in lines[:-1] if len(line) - len(line.lstrip()) < indent and not line.strip().startswith("-")
    ]
    return parents[-1].strip().rstrip(":") == path[-2]


@pytest.mark.parametrize(
    ("override", "key", "part"),
    [
        ("training.batch_size=4.7", "training.batch_size", "whole number"),
        ("training.batch_size=true", "training.batch_size", "whole number"),
        ("training.batch_size=0", "training.batch_size", "out of range"),
        ("training.lr=fast", "training.lr", "a number is wanted"),
        ("training.lr=nan", "training.lr", "finite"),
        ("training.lr=0", "training.lr", "out of range"),
        ("injection.attn_lora.enabled=1", "injection.attn_lora.enabled", "true or false"),
        ("injection.attn_lora.enabled='false'", "injection.attn_lora.enabled", "true or false"),
        ("injection.target_keywords=gate_proj", "injection.target_keywords", "a list is wanted"),
        ("model_name=3", "model_name", "text is wanted"),
        ("injection.lora_dropout=1.0", "injection.lora_dropout", "out of range"),
        ("injection.lora_r=0", "injection.lora_r", "LoRA layers will act as Identity"),
        ("training=3", "training", "a table is wanted"),
        ("training.lr.x=3", "training.lr.x", "not a table"),
        ("data.validation={size=3, fraction=0.5}", "data.validation.fraction", "exclude each other"),
        ("model.load_precision.mode=int5", "model.load_precision.mode", "not allowed"),
    ],
)
def test_nothing_is_converted_that_was_not_meant(load: Any, override: str, key: str, part: str) -> None:
    found = problems(load, TOML, override)
    assert [problem.key for problem in found] == [key]
    assert part in found[0].message
    assert found[0].source == "--set"


@pytest.mark.parametrize("text", [TOML, 'model_name = "m"\n\n[training]\nlr = 1e-5\n'])
@pytest.mark.parametrize("override", ["training.phases.0.step=0", "training.phases[0].step=0"])
def test_an_entry_of_a_list_on_the_command_line_is_blamed_on_it(load: Any, text: str, override: str) -> None:
    (problem,) = problems(load, text, override)
    assert problem.source == "--set"
    assert problem.hint in (
        "--set 'training.phases=[...]'", "each has the keys step, trainable", "did you mean training.phases?"
    )  # fmt: skip


def test_pythons_spelling_and_tomls_dates_are_shown_as_they_are_written_here(load: Any) -> None:
    for written in ("True", "'false'"):
        (problem,) = problems(load, TOML, f"injection.attn_lora.enabled={written}")
        assert problem.hint == f"write {written.strip(chr(39)).lower()}, without quotes"
    (problem,) = problems(load, TOML + "\n[data]\ndate = 2026-11-25\n")
    assert problem.message == "text is wanted, not the date or time 2026-11-25"
    assert problem.hint == 'write "2026-11-25" in quotes'
    (problem,) = problems(load, TOML + "\n[data]\nmax_length = 12:30:00\n")
    assert problem.message == "a whole number is wanted, not the date or time 12:30:00"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("injection.target_keywords=q_proj,v_proj", 'write ["q_proj", "v_proj"]'),
        ("injection.target_keywords=q_proj, v_proj", 'write ["q_proj", "v_proj"]'),
        ("injection.target_keywords=q_proj", 'write ["q_proj"]'),
        ("injection.layer_indices=0,1", "write [0, 1]"),
        ("injection.layer_indices=3", "write [3]"),
        ("injection.layer_indices={a=1}", "write [...]"),
        ("evaluation.prompts=What is it, then?", 'write ["What is it, then?"]'),
    ],
)
def test_a_list_that_was_written_as_text_is_shown_as_it_should_be(load: Any, override: str, hint: str) -> None:
    assert problems(load, TOML, override)[0].hint == hint


@pytest.mark.parametrize(
    ("sets", "part"),
    [
        (["training.save_steps=10", "training.val_steps=10"], "data.validation holds no rows out"),
        (["data.validation.size=5"], "training.save_steps (0) is no multiple of training.val_steps (0)"),
        (["data.validation.size=5", "training.save_steps=10"], "(10) is no multiple of training.val_steps (0)"),
        (["data.validation.size=5", "training.save_steps=10", "training.val_steps=4"], "is no multiple"),
        (["data.validation.size=5", "training.save_steps=10", "training.val_steps=5"], None),
    ],
)
def test_the_best_checkpoints_need_a_loss_each(load: Any, sets: list[str], part: str | None) -> None:
    words = ["training.save_steps=0", "training.val_steps=0", *sets, "checkpoint.keep_best=2"]
    found = best_problems(load(TOML, *words).run)
    assert [problem.key for problem in found] == ["checkpoint.keep_best"] * (part is not None)
    assert all(str(part) in problem.message for problem in found)


def test_the_tutorials_overrides_are_numbers(load: Any) -> None:
    run = load(TOML, "training.lr=2e-5", "injection.lora_r=32", "training.max_train_steps=10000").run
    assert (run.training.lr, run.injection.lora_r, run.training.max_train_steps) == (2e-5, 32, 10000)
    assert isinstance(run.training.lr, float)


def test_the_home_folder_is_meant_by_its_sign(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load(TOML, "output_dir=~/runs/a").run.output_dir == "/home/somebody/runs/a"
    assert load(TOML, output_dir="~/b").run.output_dir == "/home/somebody/b"


def test_output_dir_defaults_to_the_presets_name_and_the_option_wins(load: Any) -> None:
    assert load(TOML).run.output_dir == "runs/preset"
    loaded = load(TOML, "output_dir=a", output_dir="b")
    assert loaded.run.output_dir == "b"
    assert loaded.source("output_dir") == "--output-dir"
