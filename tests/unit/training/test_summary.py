"""What a finished run says."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

import pytest

from eulerforge.cli.main import command_parser
from eulerforge.terminal import strict
from eulerforge.training.manifest import TrainState
from eulerforge.training.summary import make_summary, summary_lines

BEFORE = {"held_out_loss": 4.0, "samples": [{"prompt": "Why?", "answer": "dunno", "reference": "Law."}]}
AFTER = {"held_out_loss": 3.0, "samples": [{"prompt": "Why?", "answer": "Law.", "reference": "Law."}]}


def state(**changes: Any) -> TrainState:
    return TrainState(**{"step": 9, "tokens": 5000, "label_tokens": 3000, "seconds": 20.0, "before": BEFORE, **changes})


@pytest.fixture
def run(make_run: Callable[..., Any]) -> Any:
    return make_run()


def test_the_facts(run: Any) -> None:
    summary = make_summary(run, state(), AFTER)
    assert summary["held_out"] == {"before": 4.0, "after": 3.0, "change": -0.25}
    assert summary["tokens_per_s"] == 250.0
    assert summary["trained_parameters"] == run.report.parameter_count
    assert summary["samples"] == [{"prompt": "Why?", "base": "dunno", "tuned": "Law.", "reference": "Law."}]
    assert summary["final"] == str(run.out / "final")


def test_the_lines(run: Any) -> None:
    lines = summary_lines(make_summary(run, state(), AFTER))
    assert lines[:5] == ["prompt: Why?", "  base: dunno", "  tuned: Law.", "  reference: Law.", ""]
    assert lines[5] == "held-out loss 4.0000 -> 3.0000 (25.0% lower)"
    assert lines[6].startswith("9 steps, 5,000 tokens in 20 s, 250 tokens/s, peak memory ")
    assert lines[7] == f"written to {run.out / 'final'}"
    assert [line.split()[2] for line in lines[8:]] == ["bench", "merge"]


def test_a_worse_model_is_said_loudly_and_the_unknown_is_not_invented(run: Any) -> None:
    worse = make_summary(run, state(), {**AFTER, "held_out_loss": 5.0})
    assert "held-out loss 4.0000 -> 5.0000 (25.0% HIGHER)" in summary_lines(worse)
    bare = make_summary(run, state(before={}, seconds=0.0), {"samples": []})
    assert bare["held_out"] is None
    assert bare["tokens_per_s"] is None
    assert not any("held-out" in line for line in summary_lines(bare))


def test_held_out_rows_that_only_the_end_has(run: Any) -> None:
    summary = make_summary(run, state(before={"samples": []}), AFTER)
    assert summary["held_out"] == {"before": None, "after": 3.0, "change": None}
    assert "held-out loss 3.0000" in summary_lines(summary)


def test_a_loss_that_was_not_finite_is_null_in_the_file_and_nan_for_a_person(run: Any) -> None:
    summary = make_summary(run, state(before={}), {"held_out_loss": float("nan"), "samples": []})
    read = json.loads(json.dumps(strict(summary), allow_nan=False))
    assert "held-out loss nan" in summary_lines(read)


def test_answers_are_paired_by_prompt(run: Any) -> None:
    other = {"samples": [{"prompt": "New?", "answer": "yes", "reference": None}, *AFTER["samples"]]}
    samples = make_summary(run, state(), other)["samples"]
    assert [(sample["prompt"], sample["base"]) for sample in samples] == [("New?", None), ("Why?", "dunno")]


def test_a_folder_with_a_space_can_be_pasted(make_run: Callable[..., Any], tmp_path: Any) -> None:
    run = make_run(output_dir=str(tmp_path / "my run"))
    assert make_summary(run, state(), AFTER)["next"][0] == f"eulerforge bench '{tmp_path / 'my run'}'"


def test_the_next_commands_are_commands(run: Any) -> None:
    for command in make_summary(run, state(), AFTER)["next"]:
        _, name, *arguments = shlex.split(command)
        command_parser(name).parse_args(arguments)


def test_a_finished_run_without_a_summary(tmp_path: Any) -> None:
    assert summary_lines({"output_dir": "runs/x", "already_finished": True}) == ["runs/x is finished"]


def test_one_prompt_twice_has_two_answers(run: Any) -> None:
    """Two held-out rows may ask the same under other system prompts."""
    two = {"samples": [*BEFORE["samples"], {**BEFORE["samples"][0], "answer": "Arr"}]}
    samples = make_summary(run, state(before=two), {"samples": AFTER["samples"] * 2})["samples"]
    assert [sample["base"] for sample in samples] == ["dunno", "Arr"]
