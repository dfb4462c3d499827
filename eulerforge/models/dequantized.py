"""The product of a linear layer whose weight is stored in another form than it is multiplied in.

On the CPU the weight to multiply with lies in a room that all layers share (``models/room.py``): a weight of its own
for every product left a hole in the heap between the blocks that autograd keeps.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F

from eulerforge.models.room import WEIGHT, room


class Stored(Protocol):
    """A linear layer; ``compute_dtype`` is the precision of its products."""

    compute_dtype: torch.dtype
    in_features: int
    out_features: int
    bias: Any

    def dequantize_into(self, out_OI: torch.Tensor) -> None:
        """Write the weight into ``out_OI``, rounded once."""

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as a tensor of its own."""


def linear(layer: Stored, x: torch.Tensor) -> torch.Tensor:
    """``x W^T + bias`` in the layer's ``compute_dtype``, the result in x's precision; x is (..., in_features)."""
    bias = layer.bias
    # within the product, as a plain layer's; a bias that trains needs autograd's own sum
    inside = bias is not None and not bias.requires_grad and bias.dtype == layer.compute_dtype
    product: torch.Tensor = _Product.apply(x.to(layer.compute_dtype), layer, bias if inside else None)
    product = product if bias is None or inside else product + bias.to(product.dtype)
    return product.to(x.dtype)


def _weight(layer: Stored, like: torch.Tensor) -> torch.Tensor:
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return layer.dequantized(like.dtype)
    weight_OI = room(WEIGHT, (layer.out_features, layer.in_features), like)
    layer.dequantize_into(weight_OI)
    return weight_OI


class _Product(torch.autograd.Function):
    """x W^T, with W made once forward and once backward: autograd keeps neither W nor x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Stored, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, _weight(layer, x), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        return grad @ _weight(ctx.layer, grad), None, None
