"""Entry module: declares the adapter and imports nothing heavy."""

from __future__ import annotations

from eulerforge.api import BackboneSpec, hookimpl

EULERFORGE_API = "1.0"


@hookimpl
def eulerforge_backbones() -> list[BackboneSpec]:
    return [
        BackboneSpec(
            name="qwen3.5",
            aliases=("qwen3_5",),
            target="eulerforge_backbone_qwen3_5.adapter:Qwen35Adapter",
            summary="Qwen3.5 with full and linear attention, dense or mixture; the language stack of multimodal ones",
            model_types=("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
            isolation="gather",
            roles=(
                "ffn.gate",
                "ffn.up",
                "ffn.down",
                "attn.q",
                "attn.k",
                "attn.v",
                "attn.o",
                "linear_attn.qkv",
                "linear_attn.gate",
                "linear_attn.out",
                "experts.gate_up",
                "experts.down",
                "shared_expert.gate",
                "shared_expert.up",
                "shared_expert.down",
                "router",
            ),
        )
    ]
