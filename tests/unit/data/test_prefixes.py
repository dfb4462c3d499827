"""Rows that begin alike: which do, what they take together, and how they lie in a micro-batch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eulerforge.data.packing import Layout
from eulerforge.data.prefixes import SHORTEST, Document, Sizes, documents_of, shared_prefixes
from eulerforge.data.tokenized import TokenizedRows

BUDGET = 90


def rows_of(*ids: list[int]) -> TokenizedRows:
    """Tokens below 100 are trained."""
    rows = [(np.array(row, np.uint32), (np.array(row) < 100).astype(np.uint8)) for row in ids]
    return TokenizedRows.gather(rows, [(0, line) for line in range(len(rows))], ("rows.jsonl",))


SYSTEM = list(range(100, 120))
OTHER = list(range(200, 218))


def test_rows_share_what_all_of_their_group_begin_with() -> None:
    rows = rows_of([*SYSTEM, 1, 2, 3], [*OTHER, 1], [*SYSTEM, 1, 5], [7] * 30, [*SYSTEM, 1, 2, 9], [*OTHER, 2])
    assert shared_prefixes(rows, range(6)) == {0: (0, 20), 2: (0, 20), 4: (0, 20), 1: (1, 18), 5: (1, 18)}
    assert shared_prefixes(rows, [0, 4]) == {0: (0, 20), 4: (0, 20)}, "both are trained from there on"
    assert shared_prefixes(rows, [0, 1, 3]) == {}


def test_a_short_prefix_is_not_worth_it() -> None:
    for tokens, found in ((SHORTEST - 1, {}), (SHORTEST, {0: (0, SHORTEST), 1: (0, SHORTEST)})):
        assert shared_prefixes(rows_of([*SYSTEM[:tokens], 1], [*SYSTEM[:tokens], 2]), [0, 1]) == found


def test_equal_rows_keep_a_token_of_their_own() -> None:
    rows = rows_of(SYSTEM, SYSTEM, [*SYSTEM, 1])
    assert shared_prefixes(rows, [0, 1, 2]) == dict.fromkeys(range(3), (0, 19))
    assert shared_prefixes(rows, [0, 0]) == {0: (0, 19)}, "a row that comes twice"


def test_a_prefix_is_a_document_before_the_first_row_that_has_it() -> None:
    rows = rows_of([7] * 5, [*SYSTEM, 1], [8], [*SYSTEM, 2, 3])
    assert documents_of(rows, [0, 1, 2, 3], share=True) == [
        Document(0, 0, 5), Document(1, 0, 20), Document(1, 20, 21, after=1), Document(2, 0, 1),
        Document(3, 20, 22, after=1),
    ]  # fmt: skip
    assert documents_of(rows, [0, 1], share=False) == [Document(0, 0, 5), Document(1, 0, 21)]


def test_a_batch_says_what_goes_on_from_where() -> None:
    rows = rows_of([*SYSTEM, 1, 2], [7] * 4, [*SYSTEM, 3])
    layout = Layout(packing="flat", batch_size=3, max_length=40, token_budget=90, pad_id=0, share_prefixes=True)
    batch = layout.batch(rows, [[0, 1, 2]], "cpu")
    assert batch.segments is not None
    assert batch.position_ids is not None
    assert batch.segments.lengths == (20, 2, 4, 1)
    assert batch.segments.after == (None, 0, None, 0)
    assert batch.input_ids[0].tolist() == [*SYSTEM, 1, 2, 7, 7, 7, 7, 3]
    assert batch.position_ids[0].tolist() == [*range(20), 20, 21, 0, 1, 2, 3, 20]
    assert batch.tokens == rows.token_count == 47
    # the first own token of a row is predicted from the last of the prefix
    assert batch.label_at.tolist() == [19, 20, 22, 23, 24, 19]
    assert batch.next_labels.tolist() == [1, 2, 7, 7, 7, 3]


def test_no_trained_token_is_shared() -> None:
    """Each row has a label of its own for it, which needs memory that no budget counts."""
    trained = [*SYSTEM, *[5] * 50]
    rows = rows_of([*trained, 1], [*trained, 2], [5] * 40, [5] * 41)
    assert shared_prefixes(rows, range(4)) == {0: (0, 20), 1: (0, 20)}


def test_one_line_after_another_counts_its_own_documents() -> None:
    rows = rows_of([*SYSTEM, 1], [*SYSTEM, 2], [*OTHER, 3], [*OTHER, 4])
    layout = Layout(packing="flat", batch_size=2, max_length=40, token_budget=90, pad_id=0, share_prefixes=True)
    batch = layout.batch(rows, [[0, 1], [2, 3]], "cpu")
    assert batch.segments is not None
    assert batch.segments.lengths == (20, 1, 1, 18, 1, 1, 2)
    assert batch.segments.after == (None, 0, 0, None, 3, 3, None)


def test_a_budget_counts_a_prefix_once() -> None:
    rows = rows_of(*(SYSTEM * 4 + [index] for index in range(8)))
    layout = Layout(packing="flat", batch_size=8, max_length=90, token_budget=BUDGET, pad_id=0)
    assert len(layout.cut(rows, range(8))) == 8
    (lines,) = Layout(
        packing="flat", batch_size=8, max_length=90, token_budget=BUDGET, pad_id=0, share_prefixes=True
    ).cut(rows, range(8))
    assert sorted(lines[0]) == list(range(8))


def test_nothing_is_there_from_a_rows_last_label_on() -> None:
    rows = rows_of([300, 1, 2, 301, 302], [7] * 4, [303, 5], [*SYSTEM, 1, 304], [*SYSTEM, 305, 306, 2, 307])
    assert documents_of(rows, range(5), share=False, trim=True) == [
        Document(0, 0, 2), Document(1, 0, 3), Document(2, 0, 1), Document(3, 0, 20), Document(4, 0, 22)
    ]  # fmt: skip
    assert documents_of(rows, [3, 4], share=True, trim=True) == [
        Document(3, 0, 20), Document(3, 20, 21, after=0), Document(4, 20, 22, after=0)
    ], "a token of its own stays"  # fmt: skip
    layout = Layout(packing="flat", batch_size=3, max_length=40, token_budget=90, pad_id=0, trim=True)
    batch = layout.batch(rows, [[0, 1, 2]], "cpu")
    assert batch.input_ids.tolist() == [[300, 1, 7, 7, 7, 303]]
    assert batch.label_at.tolist() == list(range(6))
    assert batch.next_labels.tolist() == [1, 2, 7, 7, 7, 5]
    assert batch.tokens == 11, "all tokens of a row count as trained"


@pytest.mark.parametrize(("packing", "lines"), [("flat", 1), ("bins", 3)])
def test_what_is_left_out_is_in_no_budget(packing: str, lines: int) -> None:
    rows = rows_of(*([300, 1, *[301] * 37] for _ in range(12)), [300, *[1] * 40], [300, *[2] * 30])
    layout = Layout(packing=packing, batch_size=9, max_length=40, token_budget=90, pad_id=0, trim=True)
    (cut,) = layout.cut(rows, range(14))
    assert len(cut) == lines
    assert cut[0][:2] == [12, 13] if packing == "flat" else [12] in cut


def test_a_row_without_labels_stays_whole() -> None:
    rows = rows_of([300, 301, 302], [5, 300, 301])
    assert documents_of(rows, [0, 1], share=False, trim=True) == [Document(0, 0, 3), Document(1, 0, 3)]


@given(st.lists(st.tuples(st.sampled_from([0, 18, 30]), st.integers(1, 30)), min_size=1, max_size=20), st.booleans())
def test_every_row_is_cut_once_and_no_budget_is_passed(made: list[tuple[int, int]], trim: bool) -> None:
    generator = np.random.default_rng(0)
    common = {tokens: generator.integers(300, 400, tokens).tolist() for tokens in (0, 18, 30)}
    rows = rows_of(*(common[tokens] + generator.choice([9, 10, 150], own).tolist() for tokens, own in made))
    layout = Layout(
        packing="flat", batch_size=4, max_length=60, token_budget=BUDGET, pad_id=0, share_prefixes=True, trim=trim
    )
    parts = layout.cut(rows, range(len(rows)))
    assert sorted(index for (line,) in parts for index in line) == list(range(len(rows)))
    sizes = Sizes(rows, shared_prefixes(rows, range(len(rows))), trim=trim)
    for lines in parts:
        batch = layout.batch(rows, lines, "cpu")
        assert batch.input_ids.numel() <= sizes.total(lines[0]) <= BUDGET
        assert batch.tokens == sum(int(rows.lengths[index]) for index in lines[0])
        pairs = [pair for index in lines[0] for pair in pairwise(rows.row(index)[0].tolist()) if pair[1] < 100]
        # what stands where a label is predicted is the token before it
        before = batch.input_ids.flatten()[batch.label_at].tolist()
        assert list(zip(before, batch.next_labels.tolist(), strict=True)) == pairs
        assert batch.label_tokens <= batch.input_ids.numel()
