"""benchmarks/growth.py measures a cell end to end and writes what the page on growth is made from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "growth.py"
KEYS = {"tokens_per_step", "cpu_s_per_step", "tokens_per_cpu_s", "loaded_rss", "peak_rss", "loss"}


def test_the_smallest_cell(tmp_path: Path) -> None:
    out = tmp_path / "growth.json"
    command = [sys.executable, str(SCRIPT), "--axis", "layers", "--at", "2", "--steps", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert set(report) == {"date", "device", "versions", "python", "command", "shape", "base", "cells"}
    assert report["command"] == "python benchmarks/growth.py --axis layers --at 2 --steps 2"
    (cell,) = report["cells"]
    assert set(cell) == {"axis", "value", "length", "batch", "vocabulary", "rank", "layers"} | KEYS
    assert cell["tokens_per_step"] == cell["batch"] * cell["length"] == 2048
    assert 0 < cell["loaded_rss"] <= cell["peak_rss"]
    assert cell["tokens_per_cpu_s"] * cell["cpu_s_per_step"] == pytest.approx(2048)
    # random rows and weights: the loss is near that of guessing among 8,192 words, 9.01
    assert 8.9 < cell["loss"] < 9.3


def test_one_step_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--steps", "1", "--out", str(tmp_path / "growth.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the first step is left out" in done.stderr
