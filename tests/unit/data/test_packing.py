"""How a step's rows are cut, and how documents lie in a packed row."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tinyrun import labels_of

from eulerforge.config.schema import DataConfig, RunConfig, TrainingConfig
from eulerforge.data.packing import CPU_TOKENS, Layout, Lines, Segments, token_budget
from eulerforge.data.tokenized import TokenizedRows


def rows_of(lengths: list[int]) -> TokenizedRows:
    """Rows whose tokens are 100 x row + place; all but the first token are trained."""
    return TokenizedRows.gather(
        [
            (np.arange(length, dtype=np.uint32) + 100 * row, np.ones(length, np.uint8))
            for row, length in enumerate(lengths)
        ],
        [(0, row) for row in range(len(lengths))],
        ("rows.jsonl",),
    )


def layout(packing: str, **changes: object) -> Layout:
    sizes = {"batch_size": 2, "max_length": 40, "token_budget": 50, "pad_id": 0, **changes}
    return Layout(packing=packing, **sizes)  # type: ignore[arg-type]


def flattened(parts: list[Lines]) -> list[int]:
    return [index for lines in parts for line in lines for index in line]


def positions(rows: TokenizedRows, lines: Lines) -> int:
    return int(layout("flat").batch(rows, lines, "cpu").input_ids.numel())


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=25)


@given(lengths=LENGTHS, packing=st.sampled_from(["flat", "bins", "off"]), by_length=st.booleans())
def test_every_row_is_in_one_micro_batch_once_and_none_is_too_large(
    lengths: list[int], packing: str, by_length: bool
) -> None:
    rows, how = rows_of(lengths), layout(packing, by_length=by_length)
    parts = how.cut(rows, range(len(lengths)))
    assert sorted(flattened(parts)) == list(range(len(lengths)))
    for lines in parts:
        batch = how.batch(rows, lines, "cpu")
        assert batch.input_ids.numel() <= how.most_positions(len(lengths))
        assert batch.tokens == sum(lengths[index] for line in lines for index in line)
        if packing == "flat":
            assert batch.input_ids.shape[0] == 1
            assert batch.tokens == batch.input_ids.numel() <= 50, "no padding, and within the budget"
        if packing == "bins":
            assert all(sum(lengths[index] for index in line) <= 40 for line in lines)


@given(lengths=LENGTHS)
def test_similar_lengths_keep_the_padded_size_within_the_budget(lengths: list[int]) -> None:
    for lines in layout("flat", by_length=True).cut(rows_of(lengths), range(len(lengths))):
        (line,) = lines
        assert len(line) * max(lengths[index] for index in line) <= 50


def test_flat_parts_are_nearly_equal() -> None:
    rows = rows_of([30, 20, 20, 10, 10, 10])
    parts = layout("flat", token_budget=70).cut(rows, range(6))
    assert [positions(rows, lines) for lines in parts] == [50, 50]


def test_a_row_beyond_the_budget_is_alone_and_whole() -> None:
    rows = rows_of([60, 5, 5])
    parts = layout("flat", token_budget=20).cut(rows, [0, 1, 2])
    assert [positions(rows, lines) for lines in parts] == [60, 10]


def test_bins_fill_first_fit_longest_first() -> None:
    rows = rows_of([10, 30, 25, 15, 5])
    assert layout("bins", batch_size=9).cut(rows, range(5)) == [[[1, 0], [2, 3], [4]]]


def test_off_puts_neighbours_in_length_together() -> None:
    rows = rows_of([3, 40, 4, 39])
    assert layout("off").cut(rows, range(4)) == [[[1], [3]], [[2], [0]]]


def test_the_same_rows_are_cut_the_same_way_again() -> None:
    rows = rows_of([int(number) for number in np.random.default_rng(0).integers(1, 40, 64)])
    for packing in ("flat", "bins", "off"):
        assert layout(packing).cut(rows, range(64)) == layout(packing).cut(rows, range(64))


def test_documents_lie_one_after_another() -> None:
    batch = layout("flat", pad_id=7).batch(rows_of([3, 2, 4]), [[0, 1], [2]], "cpu")
    assert batch.input_ids.tolist() == [[0, 1, 2, 100, 101], [200, 201, 202, 203, 7]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert labels_of(batch).tolist() == [[-100, 1, 2, -100, 101], [-100, 201, 202, 203, -100]]
    assert batch.attention_mask is None
    assert batch.segments is not None
    assert batch.segments.lengths == (3, 2, 4, 1)
    assert batch.segments.cu_seqlens.tolist() == [0, 3, 5, 9, 10]
    assert batch.segments.cu_seqlens.dtype == torch.int32
    assert batch.segments.document_of.tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 2, 3]]
    assert (batch.tokens, batch.label_tokens) == (9, 6)
    assert batch.label_at.tolist() == [0, 1, 3, 5, 6, 7], "the positions before the labels, over all lines"
    assert batch.next_labels.tolist() == [1, 2, 101, 201, 202, 203]


def test_a_long_line_on_the_cpu_is_filled_up_to_whole_steps_by_a_document_of_its_own() -> None:
    rows = rows_of([500, 83])
    batch = layout("flat", pad_id=7).batch(rows, [[0, 1]], "cpu")
    assert batch.segments is not None
    assert batch.segments.lengths == (500, 83, 9)
    assert batch.input_ids.shape == (1, 592)
    assert batch.input_ids[0, 583:].tolist() == [7] * 9
    assert labels_of(batch)[0, 583:].unique().tolist() == [-100]
    assert batch.tokens == 583
    assert layout("flat", pad_id=7).batch(rows, [[0]], "cpu").input_ids.shape == (1, 500)
    assert layout("flat", pad_id=7).batch(rows, [[0, 1]], "meta").input_ids.shape == (1, 583)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_gather_pads_on_the_right_and_scatter_takes_back(lengths: list[int]) -> None:
    total = sum(lengths)
    segments = Segments(lengths=tuple(lengths), shape=(1, total), device=torch.device("cpu"))
    flat = torch.randn(total, 3)
    rows = segments.gather(flat)
    assert rows.shape == (len(lengths), max(lengths), 3)
    for number, (document, part) in enumerate(zip(rows, flat.split(lengths), strict=True)):
        assert torch.equal(document[: lengths[number]], part)
    assert torch.equal(segments.scatter(rows), flat)
    assert segments.document_of[0].bincount().tolist() == lengths


def config(**training: object) -> RunConfig:
    return RunConfig(
        model_name="m",
        data=DataConfig(max_length=512),
        training=TrainingConfig(**training),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("device", "training", "expected"),
    [
        ("cuda", {"batch_size": 16}, 8192),
        ("cpu", {"batch_size": 16}, CPU_TOKENS),
        ("cpu", {"batch_size": 2}, 1024),
        ("cpu", {"batch_size": 16, "tokens_per_micro_batch": 9000}, 9000),
    ],
)
def test_the_budget_never_exceeds_what_padded_rows_could_need(
    device: str, training: dict[str, int], expected: int
) -> None:
    assert token_budget(config(**training), torch.device(device)) == expected


def test_all_rows_of_a_step_in_order_of_the_plan_are_kept_by_every_cut() -> None:
    rows = rows_of([5, 9, 1, 7])
    picked = [3, 1, 1, 0]  # a small data set may show a row twice in a step
    for packing in ("flat", "bins", "off"):
        parts = layout(packing).cut(rows, picked)
        assert sorted(chain(flattened(parts))) == [0, 1, 1, 3]
