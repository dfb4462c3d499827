"""Qwen3: Llama's seven projections, with norms on q and k that are not linear and stay untouched."""

from __future__ import annotations

from eulerforge.models.layout import DenseAdapter


class Qwen3Adapter(DenseAdapter):
    """The linear modules lie where Llama has them."""
