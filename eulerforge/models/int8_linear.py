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
    # bitsandbytes' own forward moves the scales from the weight to the layer's state
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data.float().mul_(scale.view(-1, 1) / INT8_STEPS)


class _Product(torch.autograd.Function):
    """x W^T, with W dequantized once forward and once backward: autograd keeps neither W nor x."""

    @staticmethod
    def forward(ctx: Any, x_NI: torch.Tensor, layer: Int8Linear) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x_NI, dequantized(layer).to(x_NI.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad_NO,) = grads
        return grad_NO @ dequantized(ctx.layer).to(grad_NO.dtype), None
