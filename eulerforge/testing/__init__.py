"""The kit for plugin authors: classes to inherit that hold a plugin to its contract, and tiny random models.

Each check fails with one sentence that names the bug and how to mend it.
It needs pytest to run, and nothing else that the core does not need; the core never imports this package.
"""

from eulerforge.testing.backbone import BackboneConformance
from eulerforge.testing.fault import Nonconforming
from eulerforge.testing.phases import PhaseGroupConformance
from eulerforge.testing.plugin import PluginConformance
from eulerforge.testing.strategy import StrategyConformance

__all__ = [
    "BackboneConformance",
    "Nonconforming",
    "PhaseGroupConformance",
    "PluginConformance",
    "StrategyConformance",
]
