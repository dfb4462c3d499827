"""The base's hash from a thread of its own is the one that receipt.py computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import save_tiny

from eulerforge.config import atomic, knownhash
from eulerforge.training.basehash import BaseHash
from eulerforge.training.receipt import base_weights


def test_it_is_the_same_hash(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    hashing = BaseHash()
    hashing.begin(folder)
    assert hashing.result(folder) == base_weights(folder) == hashing.result(folder)


def test_what_went_wrong_is_raised_where_the_result_is_asked_for(tmp_path: Path) -> None:
    hashing = BaseHash()
    hashing.begin(tmp_path)  # no config.json
    with pytest.raises(FileNotFoundError):
        hashing.result(tmp_path)


def test_a_result_that_nobody_began_is_computed(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    assert BaseHash().result(folder) == base_weights(folder)


def test_the_line_says_what_was_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path)
    monkeypatch.setattr(knownhash, "LARGE", 0)
    monkeypatch.setattr(atomic, "_CLOCK_TICK_NS", -(10**18))
    lines, found = [], []
    for _ in range(2):
        hashing = BaseHash()
        assert hashing.pending
        found.append(hashing.result(folder))
        assert not hashing.pending
        lines.append(hashing.line())
    assert found[0] == found[1] == base_weights(folder)
    name = found[0]["sha256"][:12]
    assert lines == [
        f"base weights: sha256 {name}, computed",
        f"base weights: sha256 {name}, remembered for 1 of 1 files, unchanged since",
    ]
