"""Finding, loading and looking up plugins: a broken plugin is a row in a table, not a crash.

Notable: nothing here imports torch, and an offer's target is imported only when a run names it.
"""

from __future__ import annotations

from eulerforge.plugins.discovery import Block, Candidate, DiscoverableEntryPoint
from eulerforge.plugins.records import KINDS, Offer, PluginRecord
from eulerforge.plugins.registry import Registry, load_registry

__all__ = [
    "KINDS",
    "Block",
    "Candidate",
    "DiscoverableEntryPoint",
    "Offer",
    "PluginRecord",
    "Registry",
    "load_registry",
]
