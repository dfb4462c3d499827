"""What a person sees: the lines, how often they come, and the time that is left."""

from __future__ import annotations

import io
import sys

import pytest

from eulerforge.training.evaluate import Evaluation
from eulerforge.training.progress import AVERAGED_STEPS, BarProgress, Progress, duration, make_progress


def row(step: int, seconds: float = 1.0) -> dict[str, float]:
    return {"step": step, "loss": 2.5, "lr": 1e-4, "grad_norm": 0.5, "tokens_per_s": 1234.5, "seconds": seconds}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (61, "1 min 01 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (90061, "25 h 01 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_at_the_first_the_last_and_every_nth_step(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(7, 3)
    for step in range(1, 8):
        progress.step(row(step))
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/7", "step 3/7", "step 6/7", "step 7/7"]
    assert "loss 2.5000  lr 1.00e-04  grad norm 0.500  1,234 tokens/s  about" in lines[0]


def test_the_time_left_is_an_average_and_counts_what_lies_between_steps(capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    progress = Progress(100, 1, clock=lambda: now)

    def left_after(step: int, passed: float, seconds: float) -> str:
        nonlocal now
        now += passed
        progress.step(row(step, seconds))
        return capsys.readouterr().err.strip().rpartition("about ")[2]

    assert left_after(11, 0.0, 2.0) == "2 min 58 s left"  # 89 steps of 2 s, the only one that is known
    assert left_after(12, 6.0, 2.0) == "5 min 52 s left"  # 88 steps of 4 s: a checkpoint took 4 s in between
    assert left_after(13, 1.0, 1.0) == "4 min 21 s left"  # 87 steps of 3 s
    for step in range(14, 14 + AVERAGED_STEPS):
        said = left_after(step, 1.0, 1.0)
    assert said == f"{duration(100 - 13 - AVERAGED_STEPS)} left", "old steps are forgotten"


def test_validation_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(9, 1).validation(4, Evaluation(loss=1.0, tokens=9, label_tokens=3, seconds=61))
    assert capsys.readouterr().err == "step 4/9  held-out loss 1.0000  perplexity 2.72  (1 min 01 s)\n"


def test_a_bar_is_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(make_progress(3, 1)) is Progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    bar = make_progress(3, 2)
    assert type(bar) is BarProgress
    with bar:
        bar.say("rows [bold] as they are")
        for step in (1, 2, 3):
            bar.step(row(step))
        bar._bar.refresh()
    drawn = terminal.getvalue()
    assert "rows [bold] as they are" in drawn
    assert "step 2/3  loss 2.5000" in drawn
    assert "3/3 loss 2.5000  1,234 tokens/s  about 0 s left" in drawn
