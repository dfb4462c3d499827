"""Entry module: declares the strategy and imports nothing heavy."""

from __future__ import annotations

from eulerforge.api import StrategySpec, hookimpl

EULERFORGE_API = "1.0"


@hookimpl
def eulerforge_strategies() -> list[StrategySpec]:
    return [
        StrategySpec(
            name="dense_lora",
            target="eulerforge_strategy_dense_lora.injection:DenseLoRAInjection",
            config_target="eulerforge_strategy_dense_lora.config:DenseLoRAConfig",
            summary="LoRA on the linear layers of the feed-forward network and the attention",
            groups=("lora", "attn_lora"),
            stored_weights=True,
        )
    ]
