"""The page on growth shows the recorded figures, all of them, and its plots exist."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pages
import pytest

PAGE = pages.ROOT / "docs" / "explanation" / "growth.md"
RECORDED = pages.ROOT / "benchmarks" / "results" / "growth.json"
# what the page must cover, from and to
RANGES = {
    "length": (128, 8192),
    "batch": (1, 64),
    "micro_batch": (512, 16384),
    "vocabulary": (8192, 262144),
    "rank": (4, 256),
    "layers": (2, 32),
    "rows": (1000, 1_000_000),
}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads(RECORDED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def plots() -> Any:
    spec = importlib.util.spec_from_file_location("growth_plots", pages.ROOT / "benchmarks" / "growth_plots.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_axis_is_measured_from_end_to_end(report: dict[str, Any]):
    for axis, ends in RANGES.items():
        values = [cell["value"] for cell in report["cells"] if cell["axis"] == axis]
        assert (values[0], values[-1]) == ends
    assert {cell["axis"] for cell in report["cells"]} == set(RANGES)


def test_the_tables_are_the_recorded_figures(report: dict[str, Any], plots: Any):
    text = PAGE.read_text(encoding="utf-8")
    for axis in RANGES:
        assert "\n".join(plots.table(report, axis)) in text, f"run benchmarks/growth_plots.py for the table of {axis}"
    stated = [report["date"], report["python"], *(report["versions"][name] for name in ("torch", "transformers"))]
    assert all(fact in text for fact in [*stated, report["command"]])


def test_every_plot_is_there_small_and_undated():
    named = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert {Path(name).stem for name in named} == set(RANGES)
    for name in named:
        text = (PAGE.parent / name).read_text(encoding="utf-8")
        assert "<svg" in text
        assert len(text) < 40_000
        assert "dc:date" not in text
