"""What is known of one plugin, as values: the rows of ``eulerforge plugins list``."""

from __future__ import annotations

from typing import Any

import attrs

from eulerforge.api import BackboneSpec, PhaseGroupSpec, PresetSpec, Problem, StrategySpec

OK = "ok"
DISABLED = "disabled"
BROKEN = "broken"
INCOMPATIBLE = "incompatible"
CONFLICT = "conflict"
FAULTY = (BROKEN, INCOMPATIBLE, CONFLICT)

KINDS = ("backbone", "strategy", "phase_group", "preset")

AnySpec = BackboneSpec | StrategySpec | PhaseGroupSpec | PresetSpec


@attrs.frozen
class Offer:
    """One thing that a plugin offers; ``aliases`` are names that mean the same."""

    kind: str
    name: str
    spec: AnySpec = attrs.field(repr=False)
    aliases: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Every name that finds this offer."""
        return (self.name, *self.aliases)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "aliases": list(self.aliases)}


@attrs.frozen(kw_only=True)
class PluginRecord:
    """One entry point of one distribution and what became of it.

    ``status`` is ok, disabled, broken, incompatible or conflict; ``reason`` says why it is not ok and ``hint`` how to
    mend it. ``module`` is the entry module, ``traceback`` the text of the exception that broke the plugin, ``seconds``
    what loading it took.
    """

    name: str
    distribution: str
    version: str
    module: str = ""
    status: str = OK
    reason: str = ""
    hint: str = ""
    offers: tuple[Offer, ...] = ()
    traceback: str = attrs.field(default="", repr=False)
    seconds: float = attrs.field(default=0.0, eq=False)

    @property
    def qualified_name(self) -> str:
        return f"{self.distribution}:{self.name}"

    def problem(self) -> Problem:
        """The record as an error to show."""
        return Problem(
            message=f"plugin {self.qualified_name} is {self.status}: {self.reason}",
            hint=self.hint or f"eulerforge plugins show {self.name}",
        )

    def slow(self) -> Problem:
        """The time that loading took, as a warning to show."""
        return Problem(
            message=f"plugin {self.qualified_name} took {self.seconds:.1f} s to load",
            hint=f"--no-plugin {self.qualified_name} switches it off; eulerforge plugins check {self.name} looks why",
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "module": self.module,
            "status": self.status,
            "reason": self.reason,
            "hint": self.hint,
            "offers": [offer.to_json() for offer in self.offers],
        }
