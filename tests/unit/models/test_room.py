"""Memory that stays: the same place for the same name, and never more of it than a cache could hold."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from eulerforge.models import room as house
from eulerforge.models.room import room

FP32, BF16 = torch.empty(0), torch.empty(0, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def empty_house() -> Iterator[None]:
    house._KEPT.__dict__.clear()
    yield
    house._KEPT.__dict__.clear()


def test_one_name_and_precision_is_one_place_which_grows_to_the_largest() -> None:
    first = room("a", (4, 5), FP32)
    assert room("a", (2, 3), FP32).data_ptr() == first.data_ptr()
    assert room("b", (4, 5), FP32).data_ptr() != first.data_ptr()
    assert room("a", (4, 5), BF16).dtype == torch.bfloat16
    larger = room("a", (8, 5), FP32)
    assert larger.shape == (8, 5)
    assert room("a", (4, 5), FP32).data_ptr() == larger.data_ptr()


def test_what_no_cache_holds_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house, "LARGEST_BYTES", 64)
    assert room("a", (17,), FP32).shape == (17,)
    assert not house._KEPT.__dict__
    room("a", (16,), FP32)
    assert house._KEPT.rooms["a", torch.float32].numel() == 16


def test_a_room_that_evaluation_made_serves_training() -> None:
    with torch.inference_mode():
        room("a", (4,), FP32)
    x = torch.ones(4, requires_grad=True)
    (x * room("a", (4,), FP32).fill_(2)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0] * 4


def test_every_thread_has_rooms_of_its_own() -> None:
    mine = room("a", (4,), FP32)
    theirs: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: theirs.append(room("a", (4,), FP32)))
    thread.start()
    thread.join()
    assert theirs[0].data_ptr() != mine.data_ptr()
