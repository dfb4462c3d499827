"""Quantized linear layers that compute with their dequantized weight, in every mode and on every device.

bitsandbytes' own int8 layer quantizes its *input* to int8 too (through fp16), on CUDA always and on the CPU in eval
mode only: training, evaluation and the merged model would then compute three different things.
This module is imported only when a run asks for int8 or int4, because importing bitsandbytes takes seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, int8_vectorwise_quant
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt
from torch import nn

from eulerforge.models.dequantized import linear
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
    def of(cls, plain: nn.Linear, *, device: torch.device, compute_dtype: torch.dtype) -> Int8Linear:
        """Quantize a plain layer onto ``device``; its bias is taken over as it is."""
        rows, scale, _ = int8_vectorwise_quant(plain.weight.detach().to(device, torch.float16))
        with torch.device("meta"):
            made = cls(plain.in_features, plain.out_features, bias=plain.bias is not None, has_fp16_weights=False)
        made.weight = Int8Params(rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scale)
        made.bias = plain.bias
        made.compute_dtype = compute_dtype
        return made.train(plain.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(self, x)

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
        return linear(self, x)

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
