"""Qwen3: Llama's seven projections, with norms on q and k that are not linear and stay untouched.

The mixtures (Qwen3-30B-A3B and larger) have routed experts in the place of the feed-forward projections, in all layers
or in some; Qwen3 has no shared expert.
"""

from __future__ import annotations

from eulerforge.models.layout import MixtureAdapter


class Qwen3Adapter(MixtureAdapter):
    """The layout that ``MixtureAdapter`` describes; a dense model has no experts in it."""
