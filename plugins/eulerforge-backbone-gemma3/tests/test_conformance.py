"""The kit that third parties use, on our own adapter."""

from __future__ import annotations

from eulerforge.testing import BackboneConformance, PluginConformance


class TestPlugin(PluginConformance):
    plugin = "eulerforge_backbone_gemma3.plugin"


class TestBackbone(BackboneConformance):
    plugin = "eulerforge_backbone_gemma3.plugin"
    backbone = "gemma3"
    model_types = ("gemma3", "gemma3_text")
