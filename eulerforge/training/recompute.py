"""What a forward pass keeps for its backward pass, and where: recompute some layers, or keep it in the main memory.

Notable: a layer that is computed again keeps its input alone; every bit of the result stays the same, dropout included.
transformers has the switch on each of its decoder layers; this says on which. Layers below the first adapted one keep
nothing anyway: nothing there wants a gradient, so autograd never sees them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
from torch import nn

from eulerforge.errors import UsageError

OFFLOADED_BYTES = 1 << 20
"""Smaller tensors are not worth the way."""
SHARE_OF_FREE = 0.8
"""``auto`` fills at most this much of the memory that is free before the model is loaded."""
EVERY = (8, 4, 2, 1)
"""What ``auto`` tries in turn when not all activations fit: every n-th layer computed again."""
SWITCH = "gradient_checkpointing"
"""The attribute of a transformers decoder layer that says whether it is computed again."""


@attrs.frozen(kw_only=True)
class Kept:
    """What was chosen. ``every`` = n: each n-th decoder layer is computed again; 0: none."""

    every: int = 0
    offload: bool = False

    def forward(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The context that a training forward pass runs in."""
        return Offload(model.parameters()).hooks() if self.offload else nullcontext()


def recompute_layers(model: Any, layers: list[nn.Module], every: int) -> None:
    """Switch on transformers' own checkpointing, non-reentrant, for each ``every``-th layer; 0 switches it off.

    Raises:
        UsageError: a model of its own code that has no such switch.
    """
    if every == 0:
        return
    enable_gradient_checkpointing(model)
    if not all(hasattr(layer, SWITCH) for layer in layers):
        if every == 1:
            return
        raise UsageError(
            f"the decoder layers of {type(model).__name__} cannot be recomputed one by one",
            key="training.gradient_checkpointing",
            hint="--set training.gradient_checkpointing=all",
        )
    for index, layer in enumerate(layers):
        setattr(layer, SWITCH, is_recomputed(index, every))


def is_recomputed(index: int, every: int) -> bool:
    """Whether layer ``index`` is computed again where each ``every``-th one is; 0 is none."""
    return every > 0 and index % every == every - 1


def enable_gradient_checkpointing(model: Any) -> None:
    """transformers' own, non-reentrant, which is exact with frozen embeddings too."""
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.23 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if getattr(model, "_require_grads_hook", None) is not None:
        # only the reentrant kind needs embeddings that want a gradient; with them, frozen layers below the first
        # adapted one are computed again and derived for nothing
        model.disable_input_require_grads()


def every_of(wanted: str) -> int | None:
    """``off``, ``all`` and ``every_n`` as n; None for ``auto``."""
    if wanted == "auto":
        return None
    named = {"off": 0, "all": 1}
    return named[wanted] if wanted in named else int(wanted.removeprefix("every_"))


def choose_every(fits: Callable[[int], bool]) -> int:
    """The least recomputation with which a run fits: n of every n-th layer, 0 for none; 1 when nothing does."""
    return next((n for n in (0, *EVERY) if fits(n)), 1)


def in_words(every: int) -> str:
    """n as a person reads it."""
    named = {0: "no layer is computed again", 1: "every layer is computed again"}
    return named.get(every, f"every {every}th layer is computed again")


class Offload:
    """Saved tensors in the main memory; the weights, which are there anyway, and small tensors stay where they are.

    What several functions save (q and v the same input) is copied once.

    Args:
        weights: what stays where it is.
        least: bytes from which on a tensor is worth the way; None: ``OFFLOADED_BYTES``.
    """

    def __init__(self, weights: Iterable[torch.Tensor], least: int | None = None) -> None:
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self._least = OFFLOADED_BYTES if least is None else least
        self._copies: dict[tuple[Any, ...], tuple[weakref.ref[Any], weakref.ref[_Copied]]] = {}

    def hooks(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Any:
        size = tensor.numel() * tensor.element_size()
        if size < self._least or tensor.untyped_storage().data_ptr() in self._weights:
            return tensor
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        # the place of a freed tensor is used again: only the same storage object is the same tensor
        there, known = self._copies.get(key, (None, None))
        copied = known() if there is not None and known is not None and there() is storage else None
        if copied is None:
            pinned = tensor.device.type == "cuda"
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            # both ways wait in the stream that computes, so neither is read before it is written
            copy.copy_(tensor, non_blocking=pinned)
            copied = _Copied(tensor.device, copy)
            self._copies[key] = weakref.ref(storage), weakref.ref(copied)
        return copied

    @staticmethod
    def _unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        device, copy = packed.device, packed.copy
        return copy.to(device, non_blocking=device.type == "cuda") if device.type != "cpu" else copy


@attrs.frozen(eq=False)
class _Copied:
    """A saved tensor's copy, and where it came from."""

    device: torch.device
    copy: torch.Tensor
