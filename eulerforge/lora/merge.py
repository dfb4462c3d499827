"""Fold adapters into the weights beside them: in fp32, cast once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from eulerforge.api import LinearOps
from eulerforge.lora.adapted import AdaptedLinear
from eulerforge.lora.wrap import adapted_modules, replace_module


@torch.no_grad()
def merged_weight(module: AdaptedLinear, linear_ops: Callable[[nn.Module], LinearOps]) -> torch.Tensor:
    """Base weight plus what the adapter adds: fp32, shape (out_features, in_features)."""
    return module.merged_weight(linear_ops(module.base_layer).dequantize(module.base_layer))


@torch.no_grad()
def merge_in_place(model: nn.Module, linear_ops: Callable[[nn.Module], LinearOps]) -> int:
    """Merge every adapter and put the plain module back; give back how many were merged.

    Afterwards the model holds no wrapper: it is the plain model that transformers made, with other weights.
    """
    found = list(adapted_modules(model))
    for path, module in found:
        linear_ops(module.base_layer).write(module.base_layer, merged_weight(module, linear_ops))
        replace_module(model, path, module.base_layer)
    return len(found)
