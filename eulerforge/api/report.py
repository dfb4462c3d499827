"""What an injection did, as values: preflight prints it, the checkpoint stores it, merge and export read it."""

from __future__ import annotations

from collections.abc import Mapping
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

    ``unmatched`` maps a keyword that reached nothing to the nearest names in the model.
    ``partial`` maps a keyword to the layers (of those chosen) that it did not reach.
    """

    strategy: str
    layers: tuple[int, ...] = attrs.field(converter=tuple)
    depth: int
    sites: tuple[SiteReport, ...] = attrs.field(converter=tuple)
    unmatched: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict)
    partial: Mapping[str, tuple[int, ...]] = attrs.field(factory=dict)
    warnings: tuple[str, ...] = attrs.field(default=(), converter=tuple)

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

    def coverage(self) -> dict[str, dict[str, int]]:
        """Role -> {layers reached, parameters}: the layer x role table, summed over the layers."""
        table: dict[str, dict[str, int]] = {}
        for site in self.sites:
            row = table.setdefault(site.role, {"layers": 0, "sites": 0, "parameters": 0})
            row["sites"] += 1
            row["parameters"] += site.parameter_count
        for role, row in table.items():
            row["layers"] = len({site.layer for site in self.sites if site.role == role})
        return table

    def lines(self) -> list[str]:
        """The coverage as a person reads it."""
        chosen = len(self.layers)
        text = [
            f"adapted {len(self.sites)} modules in {chosen} of {self.depth} layers, {self.parameter_count:,} parameters"
        ]
        for role, row in self.coverage().items():
            text.append(f"  {role:<20} {row['layers']:>3} of {chosen} layers  {row['parameters']:>12,} parameters")
        return text

    def to_json(self) -> dict[str, Any]:
        return {**attrs.asdict(self), "coverage": self.coverage(), "parameter_count": self.parameter_count}
