"""The contract, held by EulerForge's kit."""

from __future__ import annotations

from eulerforge.testing import BackboneConformance, PluginConformance


class TestPlugin(PluginConformance):
    plugin = "eulerforge_backbone_olmo2.plugin"


class TestBackbone(BackboneConformance):
    plugin = "eulerforge_backbone_olmo2.plugin"
    backbone = "olmo2"
    model_types = ("olmo2",)
