"""Every claim of the threat model names a test that exists, and each test once."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("|") and "---" not in line and "| test |" not in line
]


@cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_row_is_a_claim_and_its_test() -> None:
    assert len(ROWS) >= 45
    assert [row for row in ROWS if len(row) != 2 or not all(row)] == []
    claims = [claim for claim, _ in ROWS]
    assert len({*claims}) == len([claim for claim in claims if not claim.startswith("the same")]) + len(
        {claim for claim in claims if claim.startswith("the same")}
    )


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_test_of_a_claim_exists(row: list[str]) -> None:
    named = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", row[1])
    assert named, "a claim without a test"
    assert named[2] in functions_of(named[1])


def test_what_stands_in_an_attack_is_claimed() -> None:
    """The other direction: a test that was written for this page is on it."""
    for file in ("test_links.py", "test_adapters_from_elsewhere.py", "test_plugins_from_elsewhere.py"):
        claimed = {name for _, cell in ROWS if file in cell for name in re.findall(r"::(\w+)", cell)}
        own = {name for name in functions_of(f"tests/attack/{file}") if name.startswith("test_")}
        sound = {name for name in own if name.endswith(("_works", "_exported", "_leads_to"))}
        assert own - claimed - sound == set()


def test_the_page_is_in_the_index() -> None:
    assert "security" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
