"""Quantized linear layers that compute with their dequantized weight, in every mode and on every device.

bitsandbytes' own int8 layer quantizes its *input* to int8 too (through fp16), on CUDA always and on the CPU in eval
mode only: training, evaluation and the merged model would then compute three different things.
On the CPU the dequantized weight lies in a room that all layers share (``models/room.py``), written a few rows at a
time: a weight of its own for every product left a hole in the heap between the blocks that autograd keeps.
This module is imported only when a run asks for int8 or int4, because importing bitsandbytes takes seconds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, int8_vectorwise_quant
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt
from torch import nn

from eulerforge.models.room import room

INT8_STEPS = 127.0
PART = 1 << 18
"""Numbers that are dequantized at a time: 1 MiB of fp32 stays in the cache."""


class Int8Linear(Linear8bitLt):
    """``Linear8bitLt`` with another forward: weight int8 (out, in), one fp32 scale per output row.

    ``compute_dtype`` is the dtype of the products and of the plain layer that a merge gives.
    """

    compute_dtype: torch.dtype

    @classmethod
    def of(cls, linear: nn.Linear, *, device: torch.device, compute_dtype: torch.dtype) -> Int8Linear:
        """Quantize a plain layer onto ``device``; its bias is taken over as it is."""
        rows, scale, _ = int8_vectorwise_quant(linear.weight.detach().to(device, torch.float16))
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False)
        made.weight = Int8Params(rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scale)
        made.bias = linear.bias
        made.compute_dtype = compute_dtype
        return made.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _linear(self, x)

    def dequantize_into(self, out_OI: torch.Tensor) -> None:
        """Write the weight into ``out_OI``, rounded once."""
        rows, scale_O = self.weight.data, _scale(self)
        count = max(1, PART // rows.shape[1])
        for first in range(0, len(rows), count):
            part = slice(first, min(first + count, len(rows)))
            part_PI = room("dequantized part", (part.stop - first, rows.shape[1]), scale_O)
            out_OI[part].copy_(part_PI.copy_(rows[part]).mul_(scale_O[part].view(-1, 1) / INT8_STEPS))

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as a tensor of its own."""
        return dequantized(self).to(dtype)


class Int4Linear(Linear4bit):
    """``Linear4bit`` whose products on the CPU are those of the dequantized weight; elsewhere bitsandbytes' own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            product_NO: torch.Tensor = super().forward(x)
            return product_NO
        return _linear(self, x)

    def dequantize_into(self, out_OI: torch.Tensor) -> None:
        """Write the weight into ``out_OI``."""
        state, columns = self.weight.quant_state, out_OI.shape[1]
        packed, absmax = self.weight.data.view(-1), _absmax(state)
        if columns % state.blocksize:  # a block reaches over the end of a row
            out_OI.copy_(dequantize_4bit(self.weight.data, state))
            return
        blocks, count = columns // state.blocksize, max(1, PART // columns)
        for first in range(0, len(out_OI), count):
            end = min(first + count, len(out_OI))
            part_PI = torch.ops.bitsandbytes.dequantize_4bit.default(
                packed.view(torch.uint8)[first * columns // 2 : end * columns // 2].view(-1, 1),
                absmax[first * blocks : end * blocks],
                state.blocksize,
                state.quant_type,
                (end - first, columns),
                out_OI.dtype,
            )
            out_OI[first:end].copy_(part_PI)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as a tensor of its own."""
        return dequantize_4bit(self.weight.data, self.weight.quant_state).to(dtype)


def dequantized(layer: Linear8bitLt) -> torch.Tensor:
    """The weight of any int8 layer in fp32, shape (out_features, in_features)."""
    return layer.weight.data.float().mul_(_scale(layer).view(-1, 1) / INT8_STEPS)


def _scale(layer: Linear8bitLt) -> torch.Tensor:
    # bitsandbytes' own forward moves the scales from the weight to the layer's state
    scale_O: torch.Tensor = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return scale_O


def _absmax(state: Any) -> torch.Tensor:
    """The largest number of each block in fp32; with double quantization they are quantized themselves."""
    if not state.nested:
        return state.absmax.float()  # type: ignore[no-any-return]
    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()  # type: ignore[no-any-return]


def _linear(layer: Int8Linear | Int4Linear, x: torch.Tensor) -> torch.Tensor:
    product_NO: torch.Tensor = _Product.apply(x.to(layer.compute_dtype), layer)
    product_NO = product_NO if layer.bias is None else product_NO + layer.bias.to(product_NO.dtype)
    return product_NO.to(x.dtype)


def _weight(layer: Int8Linear | Int4Linear, like: torch.Tensor) -> torch.Tensor:
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return layer.dequantized(like.dtype)
    weight_OI = room("dequantized", (layer.out_features, layer.in_features), like)
    layer.dequantize_into(weight_OI)
    return weight_OI


class _Product(torch.autograd.Function):
    """x W^T, with W dequantized once forward and once backward: autograd keeps neither W nor x."""

    @staticmethod
    def forward(ctx: Any, x_NI: torch.Tensor, layer: Int8Linear | Int4Linear) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x_NI, _weight(layer, x_NI))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad_NO,) = grads
        return grad_NO @ _weight(ctx.layer, grad_NO), None
