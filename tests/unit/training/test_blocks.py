"""The record of blocks: what torch makes and frees, in order, and the fit of two records."""

from __future__ import annotations

import pytest
import torch

from eulerforge.training.blocks import BlockRecord, Event, Size, Step, fitted


def test_blocks_are_seen_where_they_are_made_and_freed() -> None:
    x = torch.ones(4, 8)
    with BlockRecord([x], torch.device("cpu")) as record:
        y = x * 2
        view = y[1:].t()
        del y
        record.mark("between")
        record.mark("between")
        z = view + 1
        assert record.block_of(x) is None
        assert record.block_of(view) == 0
        del view
        x.add_(1)
    assert record.events == [Event(0, 128), Event(1, 96), Event(0, None)]
    assert record.marks == {"between": 1}
    del z
    assert record.events[-1] == Event(1, None)


def test_a_backward_pass_is_seen_and_so_is_what_it_leaves() -> None:
    weight = torch.ones(3, 5, requires_grad=True)
    x = torch.ones(2, 5)
    with BlockRecord([weight, x], torch.device("cpu")) as record:
        (x @ weight.T).square().sum().backward()
    live = {event.block: event.size for event in record.events if event.size is not None}
    for event in record.events:
        if event.size is None:
            del live[event.block]
    assert list(live.values()) == [60]
    assert weight.grad is not None
    assert record.block_of(weight.grad) in live


@pytest.mark.parametrize(
    ("size", "fixed", "per_token", "per_square"),
    [
        (lambda n: 48, 48, 0, 0),
        (lambda n: 12 * n, 0, 12, 0),
        (lambda n: 100 + 12 * n, 100, 12, 0),
        (lambda n: 3 * n * n, 0, 0, 3),
        (lambda n: 8 * n + 3 * n * n, 0, 8, 3),
    ],
)
def test_two_sizes_say_how_a_block_grows(size: object, fixed: int, per_token: int, per_square: int) -> None:
    found = Size.fitted(size(64), size(128), 64)  # type: ignore[operator]
    assert found == Size(fixed, per_token, per_square)
    assert found.at(1000, 1000 * 256) == fixed + per_token * 1000 + per_square * 256_000


def test_records_of_other_operations_do_not_fit() -> None:
    few, many = [Event(0, 64), Event(0, None)], [Event(0, 128), Event(0, None)]
    assert fitted(few, many, 64) == [Step(0, Size(per_token=1.0)), Step(0, None)]
    assert fitted(few, [*many, Event(1, 8)], 64) is None
    assert fitted(few, [Event(0, 128), Event(1, 8)], 64) is None
