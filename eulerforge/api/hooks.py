"""The whole plugin contract: four collecting hooks without arguments, and one that is asked at run time.

An entry module defines ``EULERFORGE_API = "1.0"`` and decorates the hooks that it implements with ``hookimpl``.
It is named in the ``eulerforge.plugins`` entry-point group and never imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import torch.nn

    from eulerforge.api.protocols import LinearOps
    from eulerforge.api.specs import BackboneSpec, PhaseGroupSpec, PresetSpec, StrategySpec

PROJECT = "eulerforge"
ENTRY_POINT_GROUP = "eulerforge.plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def eulerforge_backbones() -> Iterable[BackboneSpec]:
    """The backbone adapters that this plugin offers: where to inject."""
    raise NotImplementedError


@hookspec
def eulerforge_strategies() -> Iterable[StrategySpec]:
    """The injection strategies that this plugin offers: what to inject."""
    raise NotImplementedError


@hookspec
def eulerforge_phase_groups() -> Iterable[PhaseGroupSpec]:
    """The phase-group resolvers that this plugin offers: when which parameters train."""
    raise NotImplementedError


@hookspec
def eulerforge_presets() -> Iterable[PresetSpec]:
    """The presets that this plugin ships."""
    raise NotImplementedError


@hookspec(firstresult=True)
def eulerforge_linear_ops(module: torch.nn.Module) -> LinearOps | None:
    """How to read the weight of ``module`` and to merge into it; None when this plugin does not know it."""
    raise NotImplementedError


COLLECTING_HOOKS = (eulerforge_backbones, eulerforge_strategies, eulerforge_phase_groups, eulerforge_presets)
HOOK_NAMES = tuple(hook.__name__ for hook in (*COLLECTING_HOOKS, eulerforge_linear_ops))
