"""What a forward pass keeps for its backward pass, and where: recompute some layers, or keep it in the main memory.

Notable: a layer that is computed again keeps its input alone; every bit of the result stays the same, dropout included.
transformers has the switch on each of its decoder layers; this says on which. Layers below the first adapted one keep
nothing anyway: nothing there wants a gradient, so autograd never sees them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
from torch import nn

from eulerforge.errors import UsageError
from eulerforge.models.sizes import gib
from eulerforge.training.limits import free_bytes
from eulerforge.training.memory import KeptForBackward

OFFLOADED_BYTES = 1 << 20
"""Smaller tensors are not worth the way."""
SHARE_OF_FREE = 0.8
"""``auto`` fills at most this much of the free memory with activations."""
EVERY = (8, 4, 2, 1)
"""What ``auto`` tries in turn when not all activations fit: every n-th layer computed again."""
PROBE_TOKENS = 32
SWITCH = "gradient_checkpointing"
"""The attribute of a transformers decoder layer that says whether it is computed again."""


@attrs.frozen(kw_only=True)
class Kept:
    """What was chosen. ``every`` = n: each n-th decoder layer is computed again; 0: none."""

    every: int = 0
    offload: bool = False

    def forward(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The context that a training forward pass runs in."""
        return Offload(model).hooks() if self.offload else nullcontext()


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
        setattr(layer, SWITCH, index % every == every - 1)


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


def choose_every(kept: int, of_inputs: int, room: float) -> int:
    """The least recomputation with which activations fit into ``room`` bytes; 1 when nothing does.

    Args:
        kept: bytes of a micro-batch's activations without recomputation.
        of_inputs: bytes of the layers' inputs, which stay.
    """
    if kept <= room:
        return 0
    return next((n for n in EVERY if kept * (1 - 1 / n) + of_inputs / n <= room), 1)


def _input_bytes_per_token(model: Any) -> int:
    """Of all decoder layers together."""
    config = model.config.get_text_config()
    return int(config.num_hidden_layers * config.hidden_size * next(model.parameters()).element_size())


def measured_every(model: Any, positions: int, trained_bytes: int, device: torch.device) -> tuple[int, str]:
    """``auto``: what one small forward pass keeps, scaled to ``positions``, against the memory that is free.

    Returns:
        n, and a line that says how it was found.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(PROBE_TOKENS, device=device)[None] % vocabulary
    counter, was_training = KeptForBackward(model), model.training
    state = torch.get_rng_state()
    with counter.hooks():
        model.train()(input_ids=ids, use_cache=False, logits_to_keep=1)
    model.train(was_training)
    torch.set_rng_state(state)
    kept = counter.bytes * positions // PROBE_TOKENS
    inputs = _input_bytes_per_token(model) * positions
    # gradients and two moments of what trains come on top of what is there now
    room = max(0.0, SHARE_OF_FREE * (free_bytes(device) - 3 * trained_bytes))
    every = choose_every(kept, inputs, room)
    what = {0: "no layer is computed again", 1: "every layer is computed again"}.get(
        every, f"every {every}th layer is computed again"
    )
    return every, f"activations of a micro-batch: {gib(kept)}, room for {gib(room)}: {what}"


class Offload:
    """Saved tensors in the main memory; the weights, which are there anyway, and small tensors stay where they are."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}

    def hooks(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Any:
        size = tensor.numel() * tensor.element_size()
        if size < OFFLOADED_BYTES or tensor.untyped_storage().data_ptr() in self._weights:
            return tensor
        pinned = tensor.device.type == "cuda"
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        # both ways wait in the stream that computes, so neither is read before it is written
        copy.copy_(tensor, non_blocking=pinned)
        return tensor.device, copy

    @staticmethod
    def _unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        device, copy = packed
        return copy.to(device, non_blocking=device.type == "cuda") if device.type != "cpu" else copy
