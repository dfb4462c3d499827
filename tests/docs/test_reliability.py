"""The fault table names tests that exist, and no row of ours is silent."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| ")][
    2:
]


def test_every_row_is_whole() -> None:
    assert len(ROWS) > 20
    assert [row for row in ROWS if len(row) != 4 or not all(row)] == []


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_test_of_a_row_exists(row: list[str]) -> None:
    named = re.findall(r"`([\w/]*test_\w+\.py)(?:::(\w+))?`", row[2])
    assert named or row[2] == "the same"
    for file, function in named:
        (path,) = [found for found in (ROOT / "tests").rglob(Path(file).name) if str(found).endswith(file)]
        assert not function or f"def {function}(" in path.read_text(encoding="utf-8")


def test_the_peers_scripts_make_the_faults_of_the_table() -> None:
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("faults_peers*.py"))
    measured = [row[0] for row in ROWS if row[3] not in ("not measured", "has no plugins")]
    assert len(measured) >= 24
    assert scripts.count(" show(") + scripts.count(" bench.stopped(") >= 24
