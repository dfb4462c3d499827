"""The kit that third parties use, on our own phase groups."""

from __future__ import annotations

from eulerforge.testing import PhaseGroupConformance, PluginConformance


class TestPlugin(PluginConformance):
    plugin = "eulerforge_phases.plugin"


class TestStandardGroups(PhaseGroupConformance):
    plugin = "eulerforge_phases.plugin"
    phase_groups = "standard"
    model_types = ("llama", "mixtral", "qwen3_5_moe")
