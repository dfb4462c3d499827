"""Entry module: declares the adapter and imports nothing heavy."""

from __future__ import annotations

from eulerforge.api import BackboneSpec, hookimpl

EULERFORGE_API = "1.0"


@hookimpl
def eulerforge_backbones() -> list[BackboneSpec]:
    return [
        BackboneSpec(
            name="qwen3",
            target="eulerforge_backbone_qwen3.adapter:Qwen3Adapter",
            summary="Qwen3, dense and mixture of experts",
            model_types=("qwen3", "qwen3_moe"),
            # the tutorial pairs qwen3 with a Qwen3.5 checkpoint: its attention keywords reach every fourth layer only
            partial_model_types=("qwen3_5", "qwen3_5_text"),
            isolation="attention",
            roles=(
                "ffn.gate",
                "ffn.up",
                "ffn.down",
                "attn.q",
                "attn.k",
                "attn.v",
                "attn.o",
                "experts.gate_up",
                "experts.down",
                "router",
            ),
        )
    ]
