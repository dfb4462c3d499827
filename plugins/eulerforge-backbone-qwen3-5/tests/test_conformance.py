"""The kit that third parties use, on our own adapter."""

from __future__ import annotations

from eulerforge.testing import BackboneConformance, PluginConformance


class TestPlugin(PluginConformance):
    plugin = "eulerforge_backbone_qwen3_5.plugin"


class TestBackbone(BackboneConformance):
    plugin = "eulerforge_backbone_qwen3_5.plugin"
    backbone = "qwen3.5"
    model_types = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
