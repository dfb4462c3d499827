"""Mixtral: Llama's attention, and in the place of the feed-forward network 8 experts fused into two parameters.

The checkpoint's own names are keywords too: ``w1`` (gate), ``w3`` (up) and ``w2`` (down).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from eulerforge.models.layout import MIXTURE_KEYWORDS, MixtureAdapter


class MixtralAdapter(MixtureAdapter):
    """Feed-forward keywords mean the routed experts."""

    keywords: ClassVar[Mapping[str, Sequence[str]]] = {
        **MIXTURE_KEYWORDS,
        "w1": ("experts.gate_up",),
        "w3": ("experts.gate_up",),
        "w2": ("experts.down",),
    }
