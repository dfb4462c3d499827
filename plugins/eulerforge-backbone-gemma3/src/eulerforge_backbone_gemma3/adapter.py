"""Gemma 3: Llama's seven projections in every layer, whether its attention slides or is full.

In the multimodal models the SigLIP tower has ``q_proj`` and ``v_proj`` of its own; only the decoder's layers are looked
at, so they stay untouched.
"""

from __future__ import annotations

from eulerforge.models.layout import DenseAdapter


class Gemma3Adapter(DenseAdapter):
    """The linear modules lie where Llama has them."""
