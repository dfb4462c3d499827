"""Rooms: memory for what a function needs only while it runs, the same memory from call to call.

Notable: on a CPU the allocator hands out another place each time, whose pages are neither mapped nor in the cache. A
product into a room that is still in the cache costs a third of one into fresh memory.
"""

from __future__ import annotations

import ctypes
import math
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

LARGEST_BYTES = 64 << 20
"""A larger room is made anew each time: it would not stay in any cache, and the process would keep it for good."""
WEIGHT = "weight"
"""The room of a weight that is made for a product, of any layer; see ``LARGEST_WEIGHT``."""
LARGEST_WEIGHT = 1 << 30
"""As ``LARGEST_BYTES``, of that room: a large weight made anew is a tenth of its product with 1,000 rows."""
_KEPT = threading.local()


def room(name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape, in ``like``'s precision and on its device; what lies in it is anything.

    The next call with the same name gives the same memory, so nothing of it may leave the function that asked.
    """
    count = math.prod(shape)
    largest = LARGEST_WEIGHT if name == WEIGHT else LARGEST_BYTES
    if like.device.type != "cpu" or count * like.element_size() > largest:
        return like.new_empty(shape)
    rooms: dict[tuple[str, torch.dtype], torch.Tensor] = _KEPT.__dict__.setdefault("rooms", {})
    kept = rooms.get((name, like.dtype))
    if kept is None or kept.numel() < count:
        with torch.inference_mode(False):  # one that evaluation made could not be written to in training
            kept = rooms[name, like.dtype] = torch.empty(count, dtype=like.dtype)
    return kept[:count].view(shape)


def is_glibc() -> bool:
    """Whether the C library is glibc."""
    return platform.libc_ver()[0] == "glibc"


def trim_heap() -> None:
    """Give the system back what the C library has kept of freed memory, between blocks that are in use too."""
    if is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def fresh_rooms() -> Iterator[dict[tuple[str, torch.dtype], torch.Tensor]]:
    """This thread's rooms, empty for a while: for who counts what is made, and would not see a room that is there."""
    kept = _KEPT.__dict__.get("rooms", {})
    made: dict[tuple[str, torch.dtype], torch.Tensor] = {}
    _KEPT.__dict__["rooms"] = made
    try:
        yield made
    finally:
        _KEPT.__dict__["rooms"] = kept
