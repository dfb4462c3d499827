"""The contract, held by EulerForge's kit: one distribution with all three kinds."""

from __future__ import annotations

from typing import Any

from eulerforge_demo.backbone import DemoLlama
from eulerforge_demo.config import DemoScaleConfig
from eulerforge_demo.strategy import DemoScale

from eulerforge.api import BackboneAdapter, InjectionContext, InjectionReport
from eulerforge.models.linear_ops import PLAIN
from eulerforge.testing import BackboneConformance, PhaseGroupConformance, PluginConformance, StrategyConformance


class TestPlugin(PluginConformance):
    plugin = "eulerforge_demo.plugin"


class TestBackbone(BackboneConformance):
    plugin = "eulerforge_demo.plugin"
    backbone = "demo_llama"
    model_types = ("llama",)


class TestStrategy(StrategyConformance):
    plugin = "eulerforge_demo.plugin"
    strategy = "demo_scale"


class TestPhaseGroups(PhaseGroupConformance):
    plugin = "eulerforge_demo.plugin"
    phase_groups = "demo"
    model_types = ("llama",)

    def backbone(self) -> BackboneAdapter:
        return DemoLlama()

    def inject(self, model: Any) -> InjectionReport:
        context = InjectionContext(seed=0, linear_ops=lambda module: PLAIN)
        return DemoScale().inject(model, self.backbone(), DemoScaleConfig(), context)
