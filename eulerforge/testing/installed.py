"""The plugin under test as the core finds it: installed, through its entry point, among all others."""

from __future__ import annotations

import functools
from typing import Any

from eulerforge.api import ENTRY_POINT_GROUP
from eulerforge.plugins import Offer, PluginRecord, Registry, load_registry
from eulerforge.testing.fault import Nonconforming, blamed, listed, nearest, require

HOOKS = {
    "backbone": "eulerforge_backbones",
    "strategy": "eulerforge_strategies",
    "phase_group": "eulerforge_phase_groups",
}


@functools.cache
def registry() -> Registry:
    """All installed plugins; what the environment switches off is on here."""
    return load_registry(environ={})


def record_of(entry_module: str) -> PluginRecord:
    """The plugin whose entry module this is.

    Raises:
        Nonconforming: no installed distribution names it, or the test class does not.
    """
    require(bool(entry_module), "the test class names no plugin", 'write plugin = "your_package.plugin" in it')
    records = registry().records
    for record in records:
        if record.module == entry_module:
            return record
    known = nearest(entry_module, {record.module for record in records})
    raise Nonconforming(
        f"no installed distribution has {entry_module} as an entry point of {ENTRY_POINT_GROUP} ({known}): "
        f'name it under [project.entry-points."{ENTRY_POINT_GROUP}"] in pyproject.toml and run pip install -e .'
    )


def require_loaded(record: PluginRecord) -> None:
    """Raises Nonconforming when the plugin is broken, incompatible or in conflict, with the registry's reason."""
    require(
        record.status == "ok",
        f"the plugin {record.qualified_name} is {record.status}, {record.reason}",
        record.hint or "eulerforge plugins check shows more",
    )


def offer_of(entry_module: str, kind: str, name: str) -> Offer:
    """The one offer of this kind and name.

    Raises:
        Nonconforming: the plugin does not load, or offers nothing of the name.
    """
    record = record_of(entry_module)
    require_loaded(record)
    own = [offer for offer in record.offers if offer.kind == kind]
    for offer in own:
        if offer.name == name:
            return offer
    raise Nonconforming(
        f"{entry_module} offers no {kind.replace('_', ' ')} {name!r}, but {listed([one.name for one in own]) or 'none'}"
        f": return its spec from {HOOKS[kind]}, or correct the name in the test class"
    )


def made(offer: Offer) -> Any:
    """The object behind an offer's target.

    Raises:
        Nonconforming: it cannot be imported or made.
    """
    with blamed(f"making {offer.name}", "its class takes no arguments"):
        return registry().create(offer.spec)
