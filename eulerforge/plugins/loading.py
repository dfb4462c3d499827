"""From a candidate to its offers: import, API number, hooks, specs, each step in isolation.

Notable: pluggy holds the hooks, but every implementation is called by itself, because one that raises would end a
collective call for all others.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

import attrs
import pluggy

from eulerforge.api import (
    API_VERSION,
    HOOK_NAMES,
    BackboneSpec,
    PhaseGroupSpec,
    PresetSpec,
    StrategySpec,
    hooks,
    is_compatible,
)
from eulerforge.api.version import parse
from eulerforge.plugins.discovery import Candidate
from eulerforge.plugins.isolation import PluginFailure, isolated
from eulerforge.plugins.records import BROKEN, INCOMPATIBLE, Offer, PluginRecord

CORE_DISTRIBUTION = "eulerforge-core"

COLLECTED: dict[str, tuple[str, type]] = {
    "eulerforge_backbones": ("backbone", BackboneSpec),
    "eulerforge_strategies": ("strategy", StrategySpec),
    "eulerforge_phase_groups": ("phase_group", PhaseGroupSpec),
    "eulerforge_presets": ("preset", PresetSpec),
}


class Incompatible(PluginFailure):
    """The plugin was written for another API number."""


def new_manager() -> pluggy.PluginManager:
    """A pluggy manager that knows our hooks and no plugin."""
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    return manager


def load(candidate: Candidate, manager: pluggy.PluginManager) -> PluginRecord:
    """Import ``candidate``, register it with ``manager`` and collect what it offers; a failure is a record too."""
    record = blank_record(candidate)
    try:
        module = isolated("loading", candidate.entry_point.load)
        number = isolated("reading EULERFORGE_API", lambda: getattr(module, "EULERFORGE_API", None))
        check_api(number, candidate.distribution)
        check_undecorated(module)
        try:
            register(manager, module, record.qualified_name)
            offers = collect(manager, module)
        except PluginFailure:
            if manager.is_registered(module) and manager.get_name(module) == record.qualified_name:
                manager.unregister(module)
            raise
    except PluginFailure as failure:
        return attrs.evolve(
            record,
            status=INCOMPATIBLE if isinstance(failure, Incompatible) else BROKEN,
            reason=failure.reason,
            hint=failure.hint or f"--no-plugin {record.qualified_name} switches it off",
            traceback=failure.trace,
        )
    return attrs.evolve(record, offers=offers)


def blank_record(candidate: Candidate) -> PluginRecord:
    """What is known before the import."""
    return PluginRecord(
        name=candidate.name,
        distribution=candidate.distribution,
        version=candidate.version,
        module=candidate.module,
    )


def check_api(declared: object, distribution: str) -> None:
    """Compare a plugin's API number with ours.

    Raises:
        Incompatible: it is absent, malformed, or one that we do not serve.
    """
    upgrade_plugin = f"upgrade {distribution}, or ask its author for a release for API {API_VERSION}"
    if declared is None:
        raise Incompatible(
            f"it defines no EULERFORGE_API; this core has API {API_VERSION}",
            hint=f'{upgrade_plugin}: its entry module needs EULERFORGE_API = "{API_VERSION}"',
        )
    try:
        if not isinstance(declared, str):
            raise ValueError(f"{declared!r} is not a text")
        plugin, core = parse(declared), parse(API_VERSION)
    except ValueError as error:
        raise Incompatible(
            f"its EULERFORGE_API is malformed: {error}; this core has API {API_VERSION}",
            hint=f"{upgrade_plugin}: the number is written as MAJOR.MINOR in a text",
        ) from error
    if not is_compatible(declared):
        raise Incompatible(
            f"it was written for API {declared}, this core has API {API_VERSION}",
            hint=f"upgrade {CORE_DISTRIBUTION}" if plugin > core else upgrade_plugin,
        )


def check_undecorated(module: Any) -> None:
    """A hook without its decorator would offer nothing, silently.

    Raises:
        PluginFailure: a function has a hook's prefix but not the mark.
    """
    for name, value in vars(module).items() if hasattr(module, "__dict__") else ():
        if name.startswith("eulerforge_") and inspect.isfunction(value) and not _is_marked(value):
            raise PluginFailure(f"{name} is not marked as a hook", hint=f"put @hookimpl before def {name}")


def _is_marked(function: object) -> bool:
    return hasattr(function, f"{hooks.PROJECT}_impl")


def register(manager: pluggy.PluginManager, module: Any, name: str) -> None:
    """Hand the module's hooks to pluggy.

    Raises:
        PluginFailure: a hook is unknown, has the wrong parameters, or wraps others.
    """
    try:
        isolated("registering its hooks", lambda: manager.register(module, name=name))
    except PluginFailure as failure:
        if isinstance(failure.__cause__, pluggy.PluginValidationError):
            last = str(failure.__cause__).strip().splitlines()[-1]
            raise PluginFailure(
                f"a hook has the wrong signature: {last}", hint="the hooks reference shows every hook's signature"
            ) from failure
        if manager.is_registered(module):
            raise PluginFailure(f"its module is registered already, by {manager.get_name(module)}") from failure
        raise
    for caller in manager.get_hookcallers(module) or ():
        for implementation in caller.get_hookimpls():
            if implementation.plugin is not module:
                continue
            if not caller.has_spec() and not implementation.optionalhook:
                near = difflib.get_close_matches(caller.name, HOOK_NAMES, n=1)
                raise PluginFailure(
                    f"there is no hook {caller.name}",
                    hint=f"did you mean {near[0]}?" if near else f"the hooks are {', '.join(HOOK_NAMES)}",
                )
            if implementation.hookwrapper or implementation.wrapper:
                raise PluginFailure(f"{caller.name} is a wrapper; plugins offer things, they do not wrap others")


def collect(manager: pluggy.PluginManager, module: Any) -> tuple[Offer, ...]:
    """Call the module's collecting hooks, one by one.

    Raises:
        PluginFailure: a hook raised, gave something else than its specs, or one name twice.
    """
    offers: list[Offer] = []
    for hook_name, (kind, spec_type) in COLLECTED.items():
        for implementation in getattr(manager.hook, hook_name).get_hookimpls():
            if implementation.plugin is module:
                specs = _specs(hook_name, implementation.function, spec_type)
                offers += [Offer(kind, spec.name, spec, tuple(getattr(spec, "aliases", ()))) for spec in specs]
    labels = [(offer.kind, label) for offer in offers for label in offer.labels]
    for kind, label in labels:
        if labels.count((kind, label)) > 1:
            raise PluginFailure(f"it offers the {kind} name {label!r} twice")
    return tuple(offers)


def _specs(hook_name: str, function: Any, spec_type: type) -> list[Any]:
    wanted = f"{hook_name} must return a list of {spec_type.__name__}"

    def call() -> list[Any]:
        result = function()
        if isinstance(result, str | bytes) or not isinstance(result, Iterable):
            raise PluginFailure(f"{wanted}, not {type(result).__name__}")
        return list(result)

    values = isolated(f"calling {hook_name}", call)
    for value in values:
        if not isinstance(value, spec_type):
            raise PluginFailure(f"{wanted}; it has a {type(value).__name__}")
    return values
