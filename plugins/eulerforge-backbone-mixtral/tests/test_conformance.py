"""The kit that third parties use, on our own adapter."""

from __future__ import annotations

from eulerforge.testing import BackboneConformance, PluginConformance


class TestPlugin(PluginConformance):
    plugin = "eulerforge_backbone_mixtral.plugin"


class TestBackbone(BackboneConformance):
    plugin = "eulerforge_backbone_mixtral.plugin"
    backbone = "mixtral"
    model_types = ("mixtral",)
