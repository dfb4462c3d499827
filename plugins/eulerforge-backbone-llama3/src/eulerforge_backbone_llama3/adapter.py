"""Llama: every layer has the seven dense projections, all of them plain linear modules."""

from __future__ import annotations

from eulerforge.models.layout import DenseAdapter


class Llama3Adapter(DenseAdapter):
    """The layout that ``DenseAdapter`` describes is Llama's own."""
