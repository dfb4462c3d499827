"""Entry module: declares the adapter and imports nothing heavy."""

from __future__ import annotations

from eulerforge.api import BackboneSpec, hookimpl

EULERFORGE_API = "1.0"


@hookimpl
def eulerforge_backbones() -> list[BackboneSpec]:
    return [
        BackboneSpec(
            name="llama3",
            aliases=("llama",),
            target="eulerforge_backbone_llama3.adapter:Llama3Adapter",
            summary="Llama 2, 3.x and models with Llama's layout (SmolLM2)",
            model_types=("llama",),
            isolation="attention",
            roles=("ffn.gate", "ffn.up", "ffn.down", "attn.q", "attn.k", "attn.v", "attn.o"),
        )
    ]
