"""LoRALinear: y = base(x) + scaling * dropout(x) A^T B^T.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
The rank-stabilised scaling alpha / sqrt(r) is from Kalajdzievski, "A Rank Stabilization Scaling Factor" (2023).
Suffixes of tensor names: _NI rows x in_features, _NR rows x rank, _NO rows x out_features, _RI and _OR likewise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from eulerforge.lora.adapted import AdaptedLinear


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

    def forward(self, x_NI: torch.Tensor) -> torch.Tensor:
        base_NO = self.base_layer(x_NI)
        dropped_NI = F.dropout(x_NI, self.dropout, self.training) if self.dropout else x_NI
        low_NR = F.linear(dropped_NI, self.lora_A.to(x_NI.dtype))
        # scaling on the r columns of B costs less than on the out_features columns of the result
        return base_NO + F.linear(low_NR, (self.lora_B * self.scaling).to(x_NI.dtype))

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
