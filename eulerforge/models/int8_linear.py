"""An int8 linear layer that computes with its dequantized weight, in every mode and on every device.

bitsandbytes' own layer quantizes its *input* to int8 too (through fp16), on CUDA always and on the CPU in eval mode
only: training, evaluation and the merged model would then compute three different things.
This module is imported only when a run asks for int8, because importing bitsandbytes takes seconds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import int8_vectorwise_quant
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import nn

from eulerforge.lora.room import room

INT8_STEPS = 127.0


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
        product_NO: torch.Tensor = _Product.apply(x.to(self.compute_dtype), self)
        product_NO = product_NO if self.bias is None else product_NO + self.bias.to(product_NO.dtype)
        return product_NO.to(x.dtype)


def dequantized(layer: Linear8bitLt) -> torch.Tensor:
    """The weight in fp32, shape (out_features, in_features)."""
    return layer.weight.data.float().mul_(_scales(layer))


class _Product(torch.autograd.Function):
    """x W^T, with W dequantized once forward and once backward: autograd keeps neither W nor x."""

    @staticmethod
    def forward(ctx: Any, x_NI: torch.Tensor, layer: Int8Linear) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x_NI, _in_room(layer, x_NI.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad_NO,) = grads
        return grad_NO @ _in_room(ctx.layer, grad_NO.dtype), None


def _in_room(layer: Linear8bitLt, dtype: torch.dtype) -> torch.Tensor:
    """The dequantized weight in ``dtype`` where the next layer's will lie: the heap would keep a hole for each size."""
    rows_OI = layer.weight.data
    scale_O1 = _scales(layer)
    exact_OI = torch.mul(rows_OI, scale_O1, out=room("dequantized", rows_OI.shape, scale_O1))
    if dtype == exact_OI.dtype:
        return exact_OI
    return room("dequantized", rows_OI.shape, exact_OI.new_empty(0, dtype=dtype)).copy_(exact_OI)


def _scales(layer: Linear8bitLt) -> torch.Tensor:
    """What a step of each row stands for, fp32 (out_features, 1)."""
    # bitsandbytes' own forward moves the scales from the weight to the layer's state
    scale_O: torch.Tensor = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return scale_O.view(-1, 1) / INT8_STEPS
