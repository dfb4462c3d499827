"""A strategy whose name another distribution has."""

from __future__ import annotations

from eulerforge.api import StrategySpec, hookimpl

EULERFORGE_API = "1.0"


@hookimpl
def eulerforge_strategies() -> list[StrategySpec]:
    return [
        StrategySpec(
            name="demo_scale",
            target="eulerforge_demo.strategy:DemoScale",
            config_target="eulerforge_demo.config:DemoScaleConfig",
            summary="The same name as in eulerforge-demo",
            groups=("scale",),
        )
    ]
