"""Entry module: declares the adapter and imports nothing heavy."""

from __future__ import annotations

from eulerforge.api import BackboneSpec, hookimpl

EULERFORGE_API = "1.0"


@hookimpl
def eulerforge_backbones() -> list[BackboneSpec]:
    return [
        BackboneSpec(
            name="olmo2",
            target="eulerforge_backbone_olmo2.adapter:Olmo2Adapter",
            summary="Models of model_type olmo2",
            model_types=("olmo2",),
            # tokens of one row meet in attention alone, so that packed documents can be kept apart there
            isolation="attention",
            roles=("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"),
        )
    ]
