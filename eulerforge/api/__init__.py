"""All that a plugin author imports: hooks, specs, protocols, settings and report values.

Nothing here imports torch, so an entry module stays light.
"""

from eulerforge.api.hooks import ENTRY_POINT_GROUP, HOOK_NAMES, hookimpl, hookspec
from eulerforge.api.protocols import (
    BackboneAdapter,
    InjectionContext,
    InjectionStrategy,
    LinearOps,
    PhaseGroupResolver,
    SequenceMixerFinder,
)
from eulerforge.api.report import InjectionReport, Site, SiteReport
from eulerforge.api.settings import InjectionConfig, setting
from eulerforge.api.specs import BackboneSpec, PhaseGroupSpec, PresetSpec, Spec, StrategySpec
from eulerforge.api.version import API_VERSION, is_compatible
from eulerforge.errors import Problem

__all__ = [
    "API_VERSION",
    "ENTRY_POINT_GROUP",
    "HOOK_NAMES",
    "BackboneAdapter",
    "BackboneSpec",
    "InjectionConfig",
    "InjectionContext",
    "InjectionReport",
    "InjectionStrategy",
    "LinearOps",
    "PhaseGroupResolver",
    "PhaseGroupSpec",
    "PresetSpec",
    "Problem",
    "SequenceMixerFinder",
    "Site",
    "SiteReport",
    "Spec",
    "StrategySpec",
    "hookimpl",
    "hookspec",
    "is_compatible",
    "setting",
]
