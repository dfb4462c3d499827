"""What an injection did, as values: preflight prints it, the checkpoint stores it, merge and export read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs


@attrs.frozen
class Site:
    """A place in a layer where something can be injected.

    ``path`` is relative to the layer (``mlp.gate_proj``).
    ``role`` is one of an open set (``ffn.gate``, ``attn.q``, ``experts.gate_up``...); ``other`` when the adapter has no
    name for it.
    ``parameter`` is None for a linear module; for weights that a module holds as bare parameters, such as the experts
    of a mixture fused into one tensor, it names the parameter: ``Site("mlp.experts", "experts.down", "down_proj")``.
    """

    path: str
    role: str
    parameter: str | None = None

    @property
    def name(self) -> str:
        """What an exact keyword is compared with: the parameter, else the last component of the path."""
        return self.parameter or self.path.rpartition(".")[2]


@attrs.frozen(kw_only=True)
class SiteReport:
    """One adapted module.

    ``path`` is the module's full path, ``parameters`` the full names of the parameters that were added, and ``group``
    the phase group that they train in.
    ``base_parameter`` is the adapted parameter's name where the module holds it bare, as ``Site.parameter`` is.
    """

    path: str
    layer: int
    role: str
    group: str
    keyword: str
    r: int
    alpha: float
    scaling: float
    in_features: int
    out_features: int
    parameters: tuple[str, ...] = attrs.field(converter=tuple)
    parameter_count: int
    base_parameter: str | None = None


@attrs.frozen(kw_only=True)
class InjectionReport:
    """All that a strategy injected.

    ``keywords`` are those that the strategy looked for.
    ``unmatched`` maps a keyword that reached nothing to the nearest names in the model.
    ``partial`` maps a keyword to the layers (of those chosen) that it did not reach.

    The core fills in the rest: ``present`` maps each role to the chosen layers that have a place of it, adapted or not.
    ``gaps`` says in words what is not covered; a run goes on with one only if ``allow_partial`` (the preset's word) or
    the backbone itself declared that a part is enough.
    """

    strategy: str
    layers: tuple[int, ...] = attrs.field(converter=tuple)
    depth: int
    sites: tuple[SiteReport, ...] = attrs.field(converter=tuple)
    unmatched: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict)
    partial: Mapping[str, tuple[int, ...]] = attrs.field(factory=dict)
    warnings: tuple[str, ...] = attrs.field(default=(), converter=tuple)
    keywords: tuple[str, ...] = ()
    present: Mapping[str, tuple[int, ...]] = attrs.field(factory=dict)
    gaps: tuple[str, ...] = ()
    allow_partial: bool = False

    @property
    def parameter_count(self) -> int:
        return sum(site.parameter_count for site in self.sites)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Names of the added parameters per phase group."""
        groups: dict[str, tuple[str, ...]] = {}
        for site in self.sites:
            groups[site.group] = groups.get(site.group, ()) + site.parameters
        return groups

    def coverage(self) -> dict[str, dict[str, Any]]:
        """The layer x role matrix: role -> {reached, present: lists of layers; layers, sites, parameters: counts}."""
        roles = dict.fromkeys([*self.present, *(site.role for site in self.sites)])
        table: dict[str, dict[str, Any]] = {}
        for role in roles:
            sites = [site for site in self.sites if site.role == role]
            reached = sorted({site.layer for site in sites})
            table[role] = {
                "reached": reached,
                "present": list(self.present.get(role, reached)),
                "layers": len(reached),
                "sites": len(sites),
                "parameters": sum(site.parameter_count for site in sites),
            }
        return table

    def lines(self) -> list[str]:
        """The coverage as a person reads it: each role with the layers that are adapted, of those that have it."""
        table = self.coverage()
        text = [
            f"adapted {len(self.sites)} modules in {len(self.layers)} of {self.depth} layers,"
            f" {self.parameter_count:,} parameters"
        ]
        for role, row in table.items():
            share = f"{row['layers']:>3} of {len(row['present'])} layers"
            where = f"in {ranges(row['reached'])}" if row["reached"] else "not adapted"
            text.append(f"  {role:<20} {share:<16} {row['parameters']:>14,} parameters  {where}")
        return text

    def to_json(self) -> dict[str, Any]:
        return {**attrs.asdict(self), "coverage": self.coverage(), "parameter_count": self.parameter_count}


def ranges(indices: Iterable[int]) -> str:
    """(0, 1, 2, 4) as "0-2, 4"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
