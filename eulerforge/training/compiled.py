"""torch.compile for the decoder layers, each in its place: names, parameters and checkpoints stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def compile_layers(layers: Sequence[nn.Module], device: torch.device, **options: object) -> list[str]:
    """Compile every layer for lengths that change; give back what the user should hear.

    A compiled LoRA layer computes base and path as two products, which the compiler fuses with what is around them.
    """
    for layer in layers:
        layer.compile(dynamic=True, **options)
    if device.type == "cuda":
        return []
    return [
        f"training.compile does not pay on {device.type}: most of a minute before the first step, and no faster after"
        " it (--set training.compile=false)"
    ]
