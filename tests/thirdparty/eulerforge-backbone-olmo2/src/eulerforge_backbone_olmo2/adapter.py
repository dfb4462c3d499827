"""Where the family keeps its projections, and what its users call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from eulerforge.models.layout import TableAdapter


class Olmo2Adapter(TableAdapter):
    """``roles``: a place in a layer and what it is; ``keywords``: a word of a preset and the roles that it means."""

    roles: ClassVar[Mapping[str, str]] = {
        "self_attn.q_proj": "attn.q",
        "self_attn.k_proj": "attn.k",
        "self_attn.v_proj": "attn.v",
        "self_attn.o_proj": "attn.o",
        "mlp.gate_proj": "ffn.gate",
        "mlp.up_proj": "ffn.up",
        "mlp.down_proj": "ffn.down",
    }
    keywords: ClassVar[Mapping[str, Sequence[str]]] = {
        "q_proj": ("attn.q",),
        "k_proj": ("attn.k",),
        "v_proj": ("attn.v",),
        "o_proj": ("attn.o",),
        "gate_proj": ("ffn.gate",),
        "up_proj": ("ffn.up",),
        "down_proj": ("ffn.down",),
    }
