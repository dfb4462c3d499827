"""The base's hash from a thread of its own is the one that receipt.py computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import save_tiny

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
