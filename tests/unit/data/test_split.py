"""The held-out rows: as many as asked for, disjoint, and chosen by the seed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eulerforge.data.split import split_rows
from eulerforge.errors import DataError


@given(rows=st.integers(2, 400), data=st.data(), seed=st.integers(0, 2**32))
def test_disjoint_and_complete(rows: int, data: st.DataObject, seed: int) -> None:
    size = data.draw(st.integers(1, rows - 1))
    kept, away = split_rows(rows, size=size, fraction=None, seed=seed)
    assert len(away) == size
    assert sorted([*kept.tolist(), *away.tolist()]) == list(range(rows))
    assert kept.tolist() == sorted(kept.tolist())
    again = split_rows(rows, size=size, fraction=None, seed=seed)
    assert again[1].tolist() == away.tolist()


def test_fraction_is_rounded() -> None:
    assert len(split_rows(503, size=None, fraction=0.1, seed=0)[1]) == 50
    assert len(split_rows(7, size=None, fraction=0.1, seed=0)[1]) == 1


def test_seeds_differ() -> None:
    assert split_rows(100, size=10, fraction=None, seed=0)[1].tolist() != (
        split_rows(100, size=10, fraction=None, seed=1)[1].tolist()
    )


def test_nothing_asked_nothing_held_out() -> None:
    kept, away = split_rows(3, size=None, fraction=None, seed=0)
    assert (kept.tolist(), away.tolist()) == ([0, 1, 2], [])


@pytest.mark.parametrize(
    ("size", "fraction", "key", "message"),
    [
        (10, None, "data.validation.size", "nothing is left to train on: 10 of 10"),
        (11, None, "data.validation.size", "nothing is left to train on"),
        (0, None, "data.validation.size", "nothing is left to validate on"),
        (None, 0.04, "data.validation.fraction", "nothing is left to validate on: 10 usable rows"),
        (None, 0.96, "data.validation.fraction", "nothing is left to train on"),
    ],
)
def test_an_empty_side_is_an_error(size: int | None, fraction: float | None, key: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        split_rows(10, size=size, fraction=fraction, seed=0)
    assert caught.value.problems[0].key == key
