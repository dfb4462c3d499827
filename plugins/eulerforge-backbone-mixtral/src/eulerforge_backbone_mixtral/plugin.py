"""Entry module: declares the adapter and imports nothing heavy."""

from __future__ import annotations

from eulerforge.api import BackboneSpec, hookimpl

EULERFORGE_API = "1.0"


@hookimpl
def eulerforge_backbones() -> list[BackboneSpec]:
    return [
        BackboneSpec(
            name="mixtral",
            target="eulerforge_backbone_mixtral.adapter:MixtralAdapter",
            summary="Mixtral: attention and the routed experts",
            model_types=("mixtral",),
            isolation="attention",
            roles=(
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
