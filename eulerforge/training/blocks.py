"""Every block of memory that torch's operations make and free, in order, and two records of a computation fitted.

Notable: nothing is known about any operation. A computation is run for real, on a few tokens; its blocks are seen where
torch hands them out, and a second run on twice as many tokens says which of them grow with the tokens, and which with
their square, as attention's scores do. What an operation frees before it returns is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import attrs
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@attrs.frozen
class Event:
    """Block ``block`` is made with ``size`` bytes, or freed when ``size`` is None."""

    block: int
    size: int | None


class BlockRecord(TorchDispatchMode):
    """Records while it is entered what is made on ``device``.

    ``known`` tensors (weights, inputs) were there before and are left out.

    ``earlier`` is a record of the same computation: what it made and is still there is kept for good, such as a mask
    that is made once, and is left out too.
    """

    def __init__(self, known: Iterable[torch.Tensor], device: torch.device, earlier: BlockRecord | None = None) -> None:
        super().__init__()
        self._device = device.type
        self.events: list[Event] = []
        self.marks: dict[str, int] = {}
        self._made = 0
        self._live: dict[int, int] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        # by reference too, because a place in memory is used again
        self._places: dict[int, weakref.ref[Any]] = {}
        self._before: dict[int, weakref.ref[Any]] = {}
        if earlier is not None:
            self._before = {**earlier._before, **{key: earlier._places[key] for key in earlier._live}}

    supports_higher_order_operators = True
    """flex_attention is one; torch refuses it in a mode that does not say so."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled kernels run in the mode, which torch compiles nothing in otherwise; what they make is seen when the
        next operation takes it."""
        return True

    def mark(self, name: str) -> None:
        """Remember this moment; of two of the same name the first counts."""
        self.marks.setdefault(name, len(self.events))

    def block_of(self, tensor: torch.Tensor) -> int | None:
        """The block that a tensor lies in; None when it was there before."""
        return self._live.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._see(value)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._known or tensor.device.type != self._device:
            return
        if key in self._before and self._before[key]() is storage:
            return
        self._live[key], self._places[key] = self._made, weakref.ref(storage)
        self.events.append(Event(self._made, storage.nbytes()))
        self._made += 1
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.events.append(Event(self._live.pop(key), None))


@attrs.frozen
class Size:
    """Bytes of a block: ``fixed + per_token * tokens + per_square * square``."""

    fixed: float = 0.0
    per_token: float = 0.0
    per_square: float = 0.0

    @classmethod
    def fitted(cls, at_n: int, at_2n: int, n: int) -> Size:
        """From a block's bytes at n and at 2n tokens of one document."""
        if at_2n <= 2 * at_n:
            per_token = (at_2n - at_n) / n
            return cls(fixed=at_n - per_token * n, per_token=per_token)
        per_square = (at_2n - 2 * at_n) / (2 * n * n)
        return cls(per_token=at_n / n - per_square * n, per_square=per_square)

    @classmethod
    def straight(cls, at_n: int, at_2n: int, n: int) -> Size:
        """As ``fitted``, of a sum of blocks, which has no square: each chunk of n tokens adds the same."""
        per_token = (at_2n - at_n) / n
        return cls(fixed=at_n - per_token * n, per_token=per_token)

    def at(self, tokens: int, square: int) -> int:
        return round(self.fixed + self.per_token * tokens + self.per_square * square)


@attrs.frozen
class Step:
    """As ``Event``, of any number of tokens."""

    block: int
    size: Size | None


def fitted(at_n: list[Event], at_2n: list[Event], n: int) -> list[Step] | None:
    """The two records as one; None when they are not the same operations."""
    alike = len(at_n) == len(at_2n) and all(
        a.block == b.block and (a.size is None) == (b.size is None) for a, b in zip(at_n, at_2n, strict=True)
    )
    if not alike:
        return None
    return [
        Step(a.block, None if a.size is None or b.size is None else Size.fitted(a.size, b.size, n))
        for a, b in zip(at_n, at_2n, strict=True)
    ]
