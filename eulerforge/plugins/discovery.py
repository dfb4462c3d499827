"""Which plugins are installed, read from metadata alone, and which of them must not even be imported.

Notable: blocking happens here, before any import, because a blocked plugin must cost nothing and harm nothing.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import attrs

from eulerforge.api import ENTRY_POINT_GROUP, Problem

DISABLE_VARIABLE = "EULERFORGE_DISABLE_PLUGINS"
ONLY_VARIABLE = "EULERFORGE_PLUGINS"


class DiscoverableEntryPoint(Protocol):
    """The part of ``importlib.metadata.EntryPoint`` that is used here."""

    @property
    def name(self) -> str: ...
    @property
    def value(self) -> str: ...
    @property
    def dist(self) -> Any: ...

    def load(self) -> Any: ...


@attrs.frozen(kw_only=True)
class Candidate:
    """An entry point that was found and not yet imported."""

    name: str
    distribution: str
    version: str
    entry_point: DiscoverableEntryPoint = attrs.field(repr=False)

    @property
    def module(self) -> str:
        return self.entry_point.value.partition(":")[0].strip()

    @property
    def names(self) -> frozenset[str]:
        """The names that a user may call it by, in canonical spelling."""
        own, distribution = canonical(self.name), canonical(self.distribution)
        return frozenset({own, distribution, f"{distribution}:{own}"})


def canonical(name: str) -> str:
    """One spelling for names that packaging tools treat as equal: ``My_Plugin`` and ``my-plugin``."""
    return ":".join(re.sub(r"[-_.]+", "-", part).lower() for part in name.strip().split(":"))


def installed_entry_points() -> Iterator[DiscoverableEntryPoint]:
    """Entry points of our group, in path order.

    ``importlib.metadata.entry_points`` parses every distribution and stops at the first damaged one; a foreign package
    must not stop us, so only files that mention the group are parsed, each by itself.
    """
    for distribution in importlib.metadata.distributions():
        try:
            text = distribution.read_text("entry_points.txt") or ""
            found = distribution.entry_points if ENTRY_POINT_GROUP in text else ()
        except Exception:  # noqa: BLE001, S112 - damaged metadata can raise anything, and its plugin has no name yet
            continue
        yield from (entry for entry in found if entry.group == ENTRY_POINT_GROUP)


def candidates(entry_points: Iterable[DiscoverableEntryPoint] | None = None) -> tuple[Candidate, ...]:
    """All plugins, deduplicated by (distribution, entry): the first on the path wins, as for imports."""
    found: dict[tuple[str, str], Candidate] = {}
    for entry in installed_entry_points() if entry_points is None else entry_points:
        distribution = str(getattr(entry.dist, "name", None) or "unknown")
        version = str(getattr(entry.dist, "version", None) or "?")
        key = (canonical(distribution), entry.name)
        found.setdefault(key, Candidate(name=entry.name, distribution=distribution, version=version, entry_point=entry))
    return tuple(sorted(found.values(), key=lambda one: (one.name, canonical(one.distribution))))


@attrs.frozen(kw_only=True)
class Block:
    """What the user switched off: ``disable`` maps a name to where it was given, ``only`` is None or an allow list."""

    disable: Mapping[str, str]
    only: tuple[str, ...] | None

    @classmethod
    def of(cls, disable: Sequence[str], environ: Mapping[str, str]) -> Block:
        """From ``--no-plugin`` and the two environment variables; an empty variable counts as not set."""
        off = dict.fromkeys(_split([environ.get(DISABLE_VARIABLE, "")]), DISABLE_VARIABLE)
        off |= dict.fromkeys(_split(disable), "--no-plugin")
        return cls(disable=off, only=_split([environ.get(ONLY_VARIABLE, "")]) or None)

    def reason(self, candidate: Candidate) -> str | None:
        """Why ``candidate`` is not to be imported; None when it is."""
        for name, source in self.disable.items():
            if canonical(name) in candidate.names:
                return f"switched off by {source}"
        if self.only is not None and not any(canonical(name) in candidate.names for name in self.only):
            return f"not among those that {ONLY_VARIABLE} names"
        return None

    def unmatched(self, found: Sequence[Candidate]) -> tuple[Problem, ...]:
        """A warning for every name that switches nothing."""
        known = frozenset().union(*(candidate.names for candidate in found))
        named = [*self.disable.items(), *((name, ONLY_VARIABLE) for name in self.only or ())]
        return tuple(
            Problem(
                message=f"no installed plugin is called {name!r}",
                source=source,
                hint=f"did you mean {near[0]!r}?"
                if (near := difflib.get_close_matches(canonical(name), sorted(known), n=1))
                else "eulerforge plugins list shows the installed plugins",
            )
            for name, source in named
            if canonical(name) not in known
        )


def _split(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())
