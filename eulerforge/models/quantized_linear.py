"""Quantized linear layers that compute with their dequantized weight, in every mode and on every device.

bitsandbytes' own int8 layer quantizes its *input* to int8 too (through fp16), on CUDA always and on the CPU in eval
mode only: training, evaluation and the merged model would then compute three different things.
This module is imported only when a run asks for int8 or int4, because importing bitsandbytes takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    def of(
        cls, plain: nn.Linear, weight_OI: torch.Tensor, *, device: torch.device, compute_dtype: torch.dtype
    ) -> Int8Linear:
        """Quantize the weight of a plain layer onto ``device``; the layer's bias is taken over as it is."""
        rows, scale, _ = int8_vectorwise_quant(weight_OI.to(device, torch.float16))
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
        int8_rows_into(self.weight.data, _scale(self), out_OI)

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
        state = self.weight.quant_state
        if out_OI.shape[1] % state.blocksize:  # a block reaches over the end of a row
            out_OI.copy_(dequantize_4bit(self.weight.data, state))
            return
        int4_rows_into(self.weight.data, absmax_of(state), state, 0, out_OI)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as a tensor of its own."""
        return dequantize_4bit(self.weight.data, self.weight.quant_state).to(dtype)


def int8_rows_into(rows_RI: torch.Tensor, scale_R: torch.Tensor, out_RI: torch.Tensor) -> None:
    """Write int8 rows, each with its scale, into ``out_RI``, rounded once."""
    for part in _parts(out_RI):
        part_PI = room("dequantized part", (part.stop - part.start, rows_RI.shape[1]), scale_R)
        out_RI[part].copy_(part_PI.copy_(rows_RI[part]).mul_(scale_R[part].view(-1, 1) / INT8_STEPS))


def int4_rows_into(
    packed: torch.Tensor, absmax: torch.Tensor, state: Any, first_row: int, out_RI: torch.Tensor
) -> None:
    """Write rows of a 4-bit weight of whole blocks, seen as (rows, in), into ``out_RI``, from ``first_row`` on.

    ``absmax`` is what :func:`absmax_of` gives for its ``state``.
    """
    columns = out_RI.shape[1]
    numbers, blocks = packed.view(-1).view(torch.uint8), columns // state.blocksize
    dequantize = torch.ops.bitsandbytes.dequantize_4bit
    for part in _parts(out_RI):
        first, end = first_row + part.start, first_row + part.stop
        given = (
            numbers[first * columns // 2 : end * columns // 2].view(-1, 1),
            absmax[first * blocks : end * blocks],
            state.blocksize,
            state.quant_type,
            (end - first, columns),
            out_RI.dtype,
        )
        if out_RI.device.type == "cuda" and out_RI.is_contiguous():
            dequantize.out(*given, out=out_RI[part])
        else:
            out_RI[part].copy_(dequantize.default(*given))


def _parts(out_RI: torch.Tensor) -> Iterator[slice]:
    """Rows to make at a time: on the CPU what stays in the cache."""
    count = max(1, PART // out_RI.shape[1]) if out_RI.device.type == "cpu" else max(1, len(out_RI))
    for first in range(0, len(out_RI), count):
        yield slice(first, min(first + count, len(out_RI)))


def dequantized(layer: Linear8bitLt) -> torch.Tensor:
    """The weight of any int8 layer in fp32, shape (out_features, in_features)."""
    return layer.weight.data.float().mul_(_scale(layer).view(-1, 1) / INT8_STEPS)


def _scale(layer: Linear8bitLt) -> torch.Tensor:
    # bitsandbytes' own forward moves the scales from the weight to the layer's state
    scale_O: torch.Tensor = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return scale_O


def absmax_of(state: Any) -> torch.Tensor:
    """The largest number of each block in fp32; with double quantization they are quantized themselves."""
    if not state.nested:
        return state.absmax.float()  # type: ignore[no-any-return]
    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()  # type: ignore[no-any-return]
