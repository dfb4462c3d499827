"""Which rows a step sees, and how they become tensors."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tinyrun import labels_of

from eulerforge.config.schema import RunConfig, TrainingConfig
from eulerforge.data.batches import BatchPlan, collate
from eulerforge.data.tokenized import TokenizedRows


def make_rows(*rows: tuple[list[int], list[int]]) -> TokenizedRows:
    return TokenizedRows.gather(
        [(np.array(ids, np.uint32), np.array(mask, np.uint8)) for ids, mask in rows],
        [(0, line) for line in range(1, len(rows) + 1)],
        ("rows.jsonl",),
    )


def count_rows(count: int) -> TokenizedRows:
    return make_rows(*[([number, number], [0, 1]) for number in range(count)])


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_the_cut_does_not_change_a_steps_rows(batch_size: int, accumulation: int) -> None:
    reference = BatchPlan(count_rows(37), 8, 1, seed=5)
    plan = BatchPlan(count_rows(37), batch_size, accumulation, seed=5)
    for step in (0, 3, 4, 11):
        micro = plan.step_rows(step)
        assert [len(indices) for indices in micro] == [batch_size] * accumulation
        assert list(chain(*micro)) == reference.step_rows(step)[0]


@given(rows=st.integers(1, 30), batch=st.integers(1, 7), accumulation=st.integers(1, 3), seed=st.integers(0, 99))
def test_each_epoch_sees_every_row_once(rows: int, batch: int, accumulation: int, seed: int) -> None:
    plan = BatchPlan(count_rows(rows), batch, accumulation, seed)
    steps = plan.steps_for(3)
    seen = [row for step in range(steps) for micro in plan.step_rows(step) for row in micro]
    for epoch in range(3):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert 0 <= len(seen) - 3 * rows < plan.rows_per_step


def test_order_depends_on_seed_and_step_alone() -> None:
    plan = BatchPlan(count_rows(20), 4, 1, seed=1)
    late = plan.step_rows(13)
    plan.step_rows(0)
    assert plan.step_rows(13) == late == BatchPlan(count_rows(20), 4, 1, seed=1).step_rows(13)
    assert BatchPlan(count_rows(20), 4, 1, seed=2).step_rows(13) != late
    epochs = [list(chain(*(plan.step_rows(step)[0] for step in range(5 * e, 5 * e + 5)))) for e in (0, 1)]
    assert Counter(epochs[0]) == Counter(epochs[1])
    assert epochs[0] != epochs[1]


def test_steps_for() -> None:
    plan = BatchPlan(count_rows(10), 2, 2, seed=0)
    assert [plan.steps_for(epochs) for epochs in (0.01, 0.4, 0.5, 1, 2)] == [1, 1, 2, 3, 5]
    assert BatchPlan(count_rows(100), 10, 1, seed=0).steps_for(0.1 * 3) == 3
    assert plan.epoch_at(5) == 2.0


def test_the_plan_of_a_run_ends_with_its_steps_or_its_epochs() -> None:
    training = TrainingConfig(batch_size=2, grad_accum_steps=2, max_train_steps=7)
    plan = BatchPlan.of(count_rows(10), RunConfig(model_name="m", seed=3, training=training))
    assert (plan.batch_size, plan.grad_accum_steps, plan.seed) == (2, 2, 3)
    assert plan.total_steps(training) == 7
    assert plan.total_steps(attrs.evolve(training, max_train_steps=None, num_epochs=2.0)) == 5
    assert plan.total_steps(attrs.evolve(training, max_train_steps=None)) == 3


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        BatchPlan(make_rows(), 1, 1, seed=0)


def test_collate_pads_on_the_right() -> None:
    rows = make_rows(([7, 8, 9], [0, 1, 1]), ([5], [0]), ([3, 2], [0, 1]))
    batch = collate(rows, [0, 2], pad_id=0, device="cpu")
    assert batch.input_ids.tolist() == [[7, 8, 9], [3, 2, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert labels_of(batch).tolist() == [[-100, 8, 9], [-100, 2, -100]]
    assert (batch.tokens, batch.label_tokens) == (5, 3)
    assert (batch.label_at.tolist(), batch.next_labels.tolist()) == ([0, 1, 3], [8, 9, 2])
    assert {tensor.dtype for tensor in (batch.input_ids, batch.attention_mask, batch.label_at, batch.next_labels)} == {
        torch.int64
    }


def test_a_padding_token_that_is_the_eos_token_stays_trained() -> None:
    eos = 2
    batch = collate(make_rows(([7, eos], [0, 1]), ([7, 8, 9, eos], [0, 0, 1, 1])), [0, 1], pad_id=eos, device="cpu")
    assert labels_of(batch).tolist() == [[-100, eos, -100, -100], [-100, -100, 9, eos]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_the_first_token_is_never_labelled() -> None:
    assert labels_of(collate(make_rows(([7, 8], [1, 1])), [0], pad_id=0, device="cpu")).tolist() == [[-100, 8]]


def test_token_ids_beyond_31_bits() -> None:
    big = 2**32 - 1
    assert labels_of(collate(make_rows(([1, big], [0, 1])), [0], pad_id=0, device="cpu")).tolist() == [[-100, big]]
