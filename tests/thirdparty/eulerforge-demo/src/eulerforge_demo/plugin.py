"""Entry module: declares what the distribution offers and imports nothing heavy."""

from __future__ import annotations

from eulerforge.api import BackboneSpec, PhaseGroupSpec, StrategySpec, hookimpl

EULERFORGE_API = "1.0"


@hookimpl
def eulerforge_strategies() -> list[StrategySpec]:
    return [
        StrategySpec(
            name="demo_scale",
            aliases=("demo-scale",),
            target="eulerforge_demo.strategy:DemoScale",
            config_target="eulerforge_demo.config:DemoScaleConfig",
            summary="Train one factor per output of the chosen linear layers",
            groups=("scale",),
        )
    ]


@hookimpl
def eulerforge_backbones() -> list[BackboneSpec]:
    return [
        BackboneSpec(
            name="demo_llama",
            target="eulerforge_demo.backbone:DemoLlama",
            summary="Llama's layers, written without any base class of the core",
            model_types=("llama",),
            roles=("ffn.down", "attn.o"),
        )
    ]


@hookimpl
def eulerforge_phase_groups() -> list[PhaseGroupSpec]:
    return [
        PhaseGroupSpec(
            name="demo",
            target="eulerforge_demo.strategy:ScaleGroup",
            summary="The factors that demo_scale trains",
            groups=("scale",),
        )
    ]
