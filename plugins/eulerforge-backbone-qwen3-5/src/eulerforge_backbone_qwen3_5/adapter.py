"""Qwen3.5: three layers of linear attention (Gated DeltaNet) to one of full attention.

``q_proj`` of full attention has twice the outputs: per head the query and its gate.
A layer of linear attention has query, key and value in one projection, ``in_proj_qkv``; ``in_proj_z`` makes the gate of
its output.
``in_proj_a`` and ``in_proj_b`` make one number per head (decay and step), too narrow for an adapter: no keyword reaches
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

from eulerforge.models.layout import MIXTURE_KEYWORDS, MIXTURE_ROLES, MixtureAdapter


class Qwen35Adapter(MixtureAdapter):
    """Attention keywords mean both kinds of attention, feed-forward keywords both kinds of network."""

    roles: ClassVar[Mapping[str, str]] = {
        **MIXTURE_ROLES,
        "linear_attn.in_proj_qkv": "linear_attn.qkv",
        "linear_attn.in_proj_z": "linear_attn.gate",
        "linear_attn.out_proj": "linear_attn.out",
    }
    keywords: ClassVar[Mapping[str, Sequence[str]]] = {
        **MIXTURE_KEYWORDS,
        "q_proj": ("attn.q", "linear_attn.qkv"),
        "k_proj": ("attn.k", "linear_attn.qkv"),
        "v_proj": ("attn.v", "linear_attn.qkv"),
        "o_proj": ("attn.o", "linear_attn.out"),
        "in_proj_qkv": ("linear_attn.qkv",),
        "in_proj_z": ("linear_attn.gate",),
        "out_proj": ("linear_attn.out",),
    }
    skipped = (*MixtureAdapter.skipped, "linear_attn.in_proj_a", "linear_attn.in_proj_b")

    def find_sequence_mixers(self, layer: nn.Module) -> Sequence[str]:
        """Linear attention carries its state over the borders of packed documents, so that it is given them apart."""
        return ("linear_attn",) if hasattr(layer, "linear_attn") else ()
