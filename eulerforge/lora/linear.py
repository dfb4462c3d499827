"""LoRALinear: y = base(x) + scaling * dropout(x) A^T B^T.

Notable: where the base is a frozen linear module, plain or (on the CPU) one of ``models/dequantized.py``, both
terms are one matrix product (``lora/product.py``). For that a plain base weight lies beside B's columns in one tensor,
of which ``base_layer.weight`` is a view. Nobody sees it: ``state_dict``, ``unwrap``, a move to another device and a
phase that trains the base get the weight as it was.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
The rank-stabilised scaling alpha / sqrt(r) is from Kalajdzievski, "A Rank Stabilization Scaling Factor" (2023).
Suffixes of tensor names: _NI rows x in_features, _NR rows x rank, _NO rows x out_features, _RI and _OR likewise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eulerforge.lora.adapted import AdaptedLinear
from eulerforge.lora.product import aligned_empty, augmented, low_rank
from eulerforge.models.hooks import is_hooked
from eulerforge.models.stored import StoredLinear


class LoRALinear(AdaptedLinear):
    """A frozen linear module with a trainable low-rank path beside it.

    ``lora_A`` has shape (r, in_features), ``lora_B`` (out_features, r); both are fp32 whatever the base's precision is,
    because small updates vanish in bf16.
    At the start ``lora_B`` is zero, so the module computes exactly what its base layer computes.

    Args:
        base_layer: an ``nn.Linear`` or a subclass (bitsandbytes' are).
        r: the rank, at least 1.
        alpha: the path is multiplied by alpha / r (alpha / sqrt(r) with ``use_rslora``).
        dropout: probability with which an input element of the low-rank path is dropped in training.
        generator: the CPU random source of the initial ``lora_A``.
    """

    merges_in_parts = True

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base_layer)
        if r < 1:
            raise ValueError(f"r must be at least 1, not {r}")
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.use_rslora = use_rslora
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        device = self.weight.device
        # drawn on the CPU, so that every device starts from the same values; meta has none
        init_RI = torch.empty(r, self.in_features, device="meta" if device.type == "meta" else "cpu")
        if device.type != "meta":
            nn.init.kaiming_uniform_(init_RI, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(init_RI.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        self._joined: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        if torch.compiler.is_compiling():  # what the compiler sees through, and fuses by itself
            low = F.linear(F.dropout(x, dropout) if dropout else x, self.lora_A.to(x.dtype))
            return self.base_layer(x) + F.linear(low, (self.lora_B * self.scaling).to(x.dtype))
        if self._joins(x):
            weight = self._joined_weight() if x.dtype == self.weight.dtype else self.base_layer.dequantize_into
            return augmented(x, self.lora_A, self.lora_B, weight, self.bias, self.scaling, dropout)
        self.release()
        base: torch.Tensor = self.base_layer(x)
        return base + low_rank(x, self.lora_A, self.lora_B, self.scaling, dropout)

    def _joins(self, x: torch.Tensor) -> bool:
        """Whether the base is a frozen product in x's precision, which one product with the path can compute."""
        base = self.base_layer
        weight, bias = self.weight, self.bias
        plain = type(base).forward is nn.Linear.forward and x.dtype == weight.dtype and x.device.type != "meta"
        # on a card one more pass over the weight would cost more than the second product, which nobody has measured
        quantized = hasattr(base, "dequantize_into") and x.dtype == base.compute_dtype and x.device.type == "cpu"
        if isinstance(base, StoredLinear) and base.reads_more(x):
            return False
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        amp = torch.is_autocast_enabled(x.device.type)
        return (plain or quantized) and "forward" not in vars(base) and not (is_hooked(base) or trained or amp)

    def _joined_weight(self) -> torch.Tensor:
        """(out_features, in_features + r): the base weight, which lies here and nowhere else, and room for B."""
        joined, weight = self._joined, self.weight
        # whoever moved or replaced the weight since is right: the view is made anew
        if joined is None or joined.data_ptr() != weight.data_ptr() or joined.stride() != weight.stride():
            with torch.inference_mode(False):  # what is made in that mode could not be written to in training
                joined = aligned_empty(self.out_features, self.in_features + self.r, weight)
                joined[:, : self.in_features].copy_(weight.detach())
                weight.data = joined[:, : self.in_features]
            self._joined = joined
        return joined

    def release(self) -> nn.Module:
        """The base layer with its weight as a tensor of its own, contiguous, bit for bit; a later pass joins anew."""
        if self._joined is not None:
            self.weight.data = self.weight.data.contiguous()
            self._joined = None
        return self.base_layer

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's; a weight that is a part of a larger tensor could not be saved."""
        self.release()
        return super().state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> LoRALinear:
        self.release()  # moving or casting the weight moves nothing else
        return super()._apply(fn, recurse)

    def delta(self) -> torch.Tensor:
        """scaling * lora_B @ lora_A in fp32, shape (out_features, in_features)."""
        with torch.no_grad():
            return (self.lora_B.float() @ self.lora_A.float()) * self.scaling

    def merged_part(self, name: str, base: torch.Tensor, index: tuple[slice, ...] = ()) -> torch.Tensor:
        rows = index[0] if index else slice(None)
        with torch.no_grad():
            return base + ((self.lora_B[rows].float() @ self.lora_A.float()) * self.scaling).to(base.device)

    def merged_weight(self, base_weight: torch.Tensor) -> torch.Tensor:
        return base_weight + self.delta().to(base_weight.device)

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}, scaling={self.scaling:g}"
