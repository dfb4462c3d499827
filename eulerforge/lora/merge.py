"""Fold adapters into the weights beside them: in fp32, cast once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from eulerforge.api import LinearOps
from eulerforge.lora.adapted import AdaptedLinear, AdaptedModule
from eulerforge.lora.wrap import adapted_modules, replace_module
from eulerforge.models.experts import StoredExperts


@torch.no_grad()
def merged_weight(module: AdaptedLinear, linear_ops: Callable[[nn.Module], LinearOps]) -> torch.Tensor:
    """Base weight plus what the adapter adds: fp32, shape (out_features, in_features)."""
    return module.merged_weight(linear_ops(module.base_layer).dequantize(module.base_layer))


@torch.no_grad()
def merge_parameters(module: AdaptedModule) -> None:
    """Merge into the bare parameters of ``base_layer``, in place.

    Where the wrapper allows, one slice of the first dimension (one expert) at a time: no second copy is needed.
    """
    for name in module.changed_parameters:
        parameter = module.base_layer.get_parameter(name)
        if not module.merges_in_parts:
            parameter.copy_(module.merged_part(name, parameter.float()))
            continue
        for start in range(parameter.shape[0]):
            part = parameter[start : start + 1]
            part.copy_(module.merged_part(name, part.float(), (slice(start, start + 1),)))


@torch.no_grad()
def merge_in_place(model: nn.Module, linear_ops: Callable[[nn.Module], LinearOps]) -> int:
    """Merge every adapter and put the plain module back; give back how many were merged.

    Afterwards the model holds no wrapper: it is the plain model that transformers made, with other weights.
    A quantized layer, or experts, become plain in the compute dtype: its dequantized weight plus the delta, cast once.
    """
    found = list(adapted_modules(model))
    for path, module in found:
        merged = module.release()
        if isinstance(module, AdaptedLinear):
            merged = linear_ops(merged).plain(merged, merged_weight(module, linear_ops))
        else:
            if isinstance(merged, StoredExperts):
                merged.plain()
            merge_parameters(module)
        replace_module(model, path, merged)
    return len(found)
