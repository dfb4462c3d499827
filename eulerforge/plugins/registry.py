"""The registry: what a run asks for by name, and errors that say which plugin is to blame.

Notable: loading never fails. A lookup fails, and then it names the broken or disabled plugins that might have offered
what was asked for.
"""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import attrs
import pluggy

from eulerforge.api import BackboneSpec, InjectionConfig, PhaseGroupSpec, PresetSpec, Problem, StrategySpec
from eulerforge.errors import PluginError
from eulerforge.plugins.discovery import Block, Candidate, DiscoverableEntryPoint, candidates
from eulerforge.plugins.groups import DeclaredGroups
from eulerforge.plugins.index import Index, mark_conflicts
from eulerforge.plugins.isolation import PluginFailure, import_target, instantiate, isolated
from eulerforge.plugins.loading import blank_record, load, new_manager
from eulerforge.plugins.records import CONFLICT, DISABLED, FAULTY, AnySpec, PluginRecord

if TYPE_CHECKING:
    from torch import nn

    from eulerforge.api import LinearOps, PhaseGroupResolver

KEYS = {"backbone": "backbone", "strategy": "injection.strategy"}
SLOW_SECONDS = 5.0
"""A plugin that takes longer to load is named: its entry module is to import in milliseconds."""
LIST_HINT = "eulerforge plugins list shows what is installed"


def load_registry(
    *,
    disable: Sequence[str] = (),
    strict: bool = False,
    environ: Mapping[str, str] = os.environ,
    entry_points: Iterable[DiscoverableEntryPoint] | None = None,
) -> Registry:
    """Find and load all plugins, each in isolation.

    Args:
        disable: names that must not be imported: entry, distribution or ``distribution:entry``.
        strict: refuse a registry with a plugin that is broken, incompatible or in conflict.
        environ: where ``EULERFORGE_DISABLE_PLUGINS`` and ``EULERFORGE_PLUGINS`` are read from.
        entry_points: instead of the installed ones.

    Raises:
        PluginError: with ``strict``, at least one plugin is at fault.
    """
    found = candidates(entry_points)
    block = Block.of(disable, environ)
    manager = new_manager()
    records = tuple(_record(candidate, block, manager) for candidate in found)
    slow = [record.slow() for record in records if record.seconds > SLOW_SECONDS]
    registry = Registry(records, manager, [*block.unmatched(found), *slow])
    if strict:
        registry.require_healthy()
    return registry


def _record(candidate: Candidate, block: Block, manager: pluggy.PluginManager) -> PluginRecord:
    reason = block.reason(candidate)
    if reason is None:
        began = time.perf_counter()
        record = load(candidate, manager)
        return attrs.evolve(record, seconds=time.perf_counter() - began)
    return attrs.evolve(blank_record(candidate), status=DISABLED, reason=reason)


class Registry:
    """All plugins of this process and what they offer, by kind and name."""

    def __init__(
        self, records: Sequence[PluginRecord], manager: pluggy.PluginManager, warnings: Sequence[Problem] = ()
    ) -> None:
        self.records = mark_conflicts(records, Index.of(records))
        self.index = Index.of(self.records)
        self._manager = manager
        self._warnings = tuple(warnings)

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """What the user should hear: names that switch nothing off, hooks that failed at run time."""
        return self._warnings

    def faults(self) -> tuple[Problem, ...]:
        """One problem for every plugin that is broken, incompatible or in conflict."""
        return tuple(record.problem() for record in self.records if record.status in FAULTY)

    def require_healthy(self) -> None:
        """Raise PluginError if any plugin is at fault."""
        if faults := self.faults():
            raise PluginError.of(faults)

    def backbone(self, name: str) -> BackboneSpec:
        """The backbone of this name, alias or qualified name; PluginError when there is none, or more than one."""
        return cast(BackboneSpec, self._lookup("backbone", name))

    def strategy(self, name: str) -> StrategySpec:
        """The strategy of this name, alias or qualified name; PluginError when there is none, or more than one."""
        return cast(StrategySpec, self._lookup("strategy", name))

    def backbones(self) -> tuple[BackboneSpec, ...]:
        """All backbones, those with a contested name included: a model type may still tell them apart."""
        return cast(tuple[BackboneSpec, ...], self._specs("backbone"))

    def strategies(self) -> tuple[StrategySpec, ...]:
        return cast(tuple[StrategySpec, ...], self._specs("strategy"))

    def phase_groups(self) -> tuple[PhaseGroupSpec, ...]:
        """The phase-group resolvers whose name nobody contests."""
        specs = cast(tuple[PhaseGroupSpec, ...], self._specs("phase_group"))
        return tuple(spec for spec in specs if not self.index.is_contested("phase_group", spec.name))

    def presets(self) -> tuple[PresetSpec, ...]:
        """The presets whose name nobody contests."""
        specs = cast(tuple[PresetSpec, ...], self._specs("preset"))
        return tuple(spec for spec in specs if not self.index.is_contested("preset", spec.name))

    def backbones_for(self, model_type: str) -> tuple[BackboneSpec, ...]:
        """Every backbone that covers a Hugging Face ``config.model_type`` fully."""
        return tuple(spec for spec in self.backbones() if model_type in spec.model_types)

    def backbone_for(self, model_type: str) -> BackboneSpec | None:
        """The one backbone that covers ``model_type`` fully; None when there is none.

        Raises:
            PluginError: several do, and picking one would be a guess.
        """
        found = self.backbones_for(model_type)
        if len(found) > 1:
            names = [f"{self.owner(spec).distribution}:{spec.name}" for spec in found]
            raise PluginError(
                f"several backbones cover model_type {model_type!r}: {', '.join(names)}",
                key="backbone",
                hint=" or ".join(f"--set backbone={spec.name}" for spec in found),
            )
        return found[0] if found else None

    def owner(self, spec: AnySpec) -> PluginRecord:
        """The plugin that offers ``spec``."""
        for record in self.records:
            if any(offer.spec is spec for offer in record.offers):
                return record
        raise LookupError(f"{spec.name} comes from no plugin of this registry")

    def load_target(self, spec: AnySpec) -> Any:
        """The object behind ``spec.target``; PluginError when it cannot be imported."""
        if isinstance(spec, PresetSpec):
            raise TypeError("a preset has no target")
        try:
            return import_target(spec.target)
        except PluginFailure as failure:
            raise self._blame(spec, "target", spec.target, failure) from failure

    def create(self, spec: AnySpec) -> Any:
        """The object behind ``spec.target``, an instance of it when it is a class; PluginError when that fails."""
        target = self.load_target(spec)
        try:
            return instantiate(target, spec.name)
        except PluginFailure as failure:
            raise self._blame(spec, "target", getattr(spec, "target", ""), failure) from failure

    def strategy_config(self, name: str) -> type:
        """The attrs class that owns a strategy's keys; PluginError when it is missing or not such a class."""
        spec = self.strategy(name)
        try:
            found = import_target(spec.config_target)
            if not (isinstance(found, type) and attrs.has(found) and issubclass(found, InjectionConfig)):
                raise PluginFailure("it is not an attrs class that extends InjectionConfig")
        except PluginFailure as failure:
            raise self._blame(spec, "config_target", spec.config_target, failure) from failure
        return found

    def phase_resolvers(self) -> list[tuple[PhaseGroupSpec, PhaseGroupResolver]]:
        """Every resolver, held to the groups that it declares and that nobody else claims."""
        resolvers: list[tuple[PhaseGroupSpec, PhaseGroupResolver]] = []
        for spec in self.phase_groups():
            groups = tuple(group for group in spec.groups if not self.index.is_contested("group", group))
            resolver = DeclaredGroups(self.create(spec), spec, groups, self.owner(spec).qualified_name)
            resolvers.append((spec, resolver))
        return resolvers

    def linear_ops(self, module: nn.Module) -> LinearOps | None:
        """The first plugin's answer on how to read and write ``module``; one that raises is asked no further.

        Raises:
            PluginError: one raised and no other knows: a weight in its format would be read as something else.
        """
        failed: PluginError | None = None
        for implementation in reversed(self._manager.hook.eulerforge_linear_ops.get_hookimpls()):
            arguments = [module][: len(implementation.argnames)]
            try:
                ops = isolated("calling eulerforge_linear_ops", lambda: implementation.function(*arguments))  # noqa: B023
            except PluginFailure as failure:
                failed = PluginError(
                    f"plugin {implementation.plugin_name} failed: {failure.reason}",
                    hint=f"mend it, or switch it off with --no-plugin {implementation.plugin_name}",
                )
                continue
            if ops is not None:
                return cast("LinearOps", ops)
        if failed is not None:
            raise failed
        return None

    def _specs(self, kind: str) -> tuple[AnySpec, ...]:
        return tuple(offer.spec for record in self.records for offer in record.offers if offer.kind == kind)

    def _blame(self, spec: AnySpec, field: str, target: str, failure: PluginFailure) -> PluginError:
        owner = self.owner(spec)
        return PluginError(
            f"plugin {owner.qualified_name}: {field} {target!r} of {spec.name}: {failure.reason}",
            hint=failure.hint or f"eulerforge plugins check {owner.name}",
        )

    def _lookup(self, kind: str, name: str) -> AnySpec:
        claims = self.index.find(kind, name)
        if len(claims) == 1:
            return claims[0][1].spec
        key, words = KEYS.get(kind), kind.replace("_", " ")
        if claims:
            plain = name.rpartition(":")[2]
            qualified = [f"{record.distribution}:{plain}" for record, _ in claims]
            offering = ", ".join(record.qualified_name for record, _ in claims)
            raise PluginError(
                f"several plugins offer the {words} {plain!r}: {offering}",
                key=key,
                hint=f"write {' or '.join(dict.fromkeys(qualified))}, or switch one off with --no-plugin",
            )
        suspects = self._suspects(name)
        near = difflib.get_close_matches(name, self.index.names(kind), n=1)
        message = f"there is no {words} {name!r}"
        if suspects:
            message += "; it might have come from " + ", ".join(
                f"{record.qualified_name} ({record.status}: {record.reason})" for record in suspects
            )
        known = ", ".join(self.index.names(kind)) or "none is installed"
        hint = f"did you mean {near[0]!r}?" if near else f"known: {known}; {LIST_HINT}"
        raise PluginError(message, key=key, hint=hint)

    def _suspects(self, name: str) -> list[PluginRecord]:
        """Plugins whose offers are unknown or switched off, the likeliest first, three at most."""
        unknown = [record for record in self.records if record.status not in ("ok", CONFLICT)]

        def likeness(record: PluginRecord) -> float:
            return max(
                difflib.SequenceMatcher(None, name, other).ratio() for other in (record.name, record.qualified_name)
            )

        return sorted(unknown, key=likeness, reverse=True)[:3]
