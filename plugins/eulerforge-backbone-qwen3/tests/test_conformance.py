"""The kit that third parties use, on our own adapter."""

from __future__ import annotations

from eulerforge.testing import BackboneConformance, PluginConformance


class TestPlugin(PluginConformance):
    plugin = "eulerforge_backbone_qwen3.plugin"


class TestBackbone(BackboneConformance):
    plugin = "eulerforge_backbone_qwen3.plugin"
    backbone = "qwen3"
    model_types = ("qwen3", "qwen3_moe")
