"""Entry module: declares the adapter and imports nothing heavy."""

from __future__ import annotations

from eulerforge.api import BackboneSpec, hookimpl

EULERFORGE_API = "1.0"


@hookimpl
def eulerforge_backbones() -> list[BackboneSpec]:
    return [
        BackboneSpec(
            name="gemma3",
            aliases=("gemma",),
            target="eulerforge_backbone_gemma3.adapter:Gemma3Adapter",
            summary="Gemma 3 text models and the language stack of the multimodal ones",
            model_types=("gemma3", "gemma3_text"),
            isolation="attention",
            roles=(
                "ffn.gate",
                "ffn.up",
                "ffn.down",
                "attn.q",
                "attn.k",
                "attn.v",
                "attn.o",
            ),
        )
    ]
