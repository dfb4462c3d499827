"""The kit that third parties use, on our own strategy: dense layers, and fused experts."""

from __future__ import annotations

from typing import ClassVar

from eulerforge.api import BackboneAdapter
from eulerforge.models.layout import MixtureAdapter
from eulerforge.testing import PluginConformance, StrategyConformance


class TestPlugin(PluginConformance):
    plugin = "eulerforge_strategy_dense_lora.plugin"


class TestDenseLoRA(StrategyConformance):
    plugin = "eulerforge_strategy_dense_lora.plugin"
    strategy = "dense_lora"
    settings: ClassVar = {"lora_r": 4, "attn_lora": {"enabled": True}}


class TestFusedExperts(TestDenseLoRA):
    model_type = "mixtral"

    def backbone(self) -> BackboneAdapter:
        return MixtureAdapter()
