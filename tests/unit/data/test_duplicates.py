"""Rows that stand twice: counted among the training rows, an error between training and held-out ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eulerforge.data import duplicates
from eulerforge.data.prepared import build_dataset
from eulerforge.data.tokenized import TokenizedRows
from eulerforge.errors import DataError

Write = Callable[..., str]
PAIRS = [{"prompt": f"question {number}", "response": f"answer {number}"} for number in range(10)]


def rows_of(lists: list[list[int]]) -> TokenizedRows:
    pairs = [(np.array(ids, dtype=np.uint32), np.ones(len(ids), dtype=np.uint8)) for ids in lists]
    return TokenizedRows.gather(pairs, [(0, line) for line in range(1, len(lists) + 1)], ["f"])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    lists=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=30),
    piece=st.integers(1, 9),
)
def test_equal_hashes_mean_equal_rows_wherever_the_pieces_are_cut(lists: list[list[int]], piece: int) -> None:
    whole, duplicates._PIECE = duplicates._PIECE, piece
    try:
        hashes = duplicates.row_hashes(rows_of(lists))
    finally:
        duplicates._PIECE = whole
    for one, hash_one in zip(lists, hashes, strict=True):
        for other, hash_other in zip(lists, hashes, strict=True):
            assert (one == other) == (hash_one == hash_other)
    assert duplicates.count_repeated(hashes) == len(lists) - len({tuple(ids) for ids in lists})


def test_a_subset_has_the_hashes_of_its_rows() -> None:
    rows = rows_of([[1], [2, 3], [4]])
    picked = np.array([2, 0])
    assert duplicates.row_hashes(rows.subset(picked)).tolist() == duplicates.row_hashes(rows)[picked].tolist()


def test_repeated_training_rows_are_counted_and_said(write_rows: Write, plain: Any, data_config: Any) -> None:
    data = build_dataset(data_config(path=(write_rows([*PAIRS, *PAIRS[:3], PAIRS[0]]),)), plain)
    assert data.report.train_repeated == 4
    assert "  4 training rows repeat an earlier one" in data.report.lines()
    assert data.report.to_json()["train_repeated"] == 4
    assert len(data.train) == 14, "they are counted, not taken out"


@pytest.mark.parametrize("validation", [{"path": ("own",)}, {"size": 8}])
def test_a_row_on_both_sides_is_an_error_unless_allowed(
    write_rows: Write, plain: Any, data_config: Any, validation: dict[str, Any]
) -> None:
    path = write_rows(PAIRS if "path" in validation else [*PAIRS, *PAIRS])
    if "path" in validation:
        validation = {"path": (write_rows([{"text": "new"}, PAIRS[3]], "own.jsonl"),)}
    with pytest.raises(DataError, match="held-out rows are training rows too") as caught:
        build_dataset(data_config(path=(path,), validation=validation), plain)
    (problem,) = caught.value.problems
    assert problem.key == "data.validation"
    assert "allow_overlap=true" in str(problem.hint)
    if "path" in validation:
        assert "1 held-out rows are training rows too" in problem.message
        assert f"{validation['path'][0]}:2 is {path}:4" in problem.message
    data = build_dataset(data_config(path=(path,), validation=validation | {"allow_overlap": True}), plain)
    assert any("as data.validation allows" in note for note in data.report.notes)
