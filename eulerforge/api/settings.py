"""How a configuration key is declared, for the core's schema and for strategy authors alike.

The constraints live in the field's metadata, not in attrs validators, because the reader checks them with the key's
path and source line, which a validator does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from eulerforge.errors import Problem

METADATA_KEY = "eulerforge"


@attrs.frozen(kw_only=True)
class SettingInfo:
    """What is known of one key: its help text, its allowed values and its bounds."""

    help: str
    choices: tuple[Any, ...] = ()
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    single: bool = False
    switch: tuple[Any, Any] | None = None


def setting(
    default: Any = attrs.NOTHING,
    *,
    help: str,
    factory: Any = None,
    choices: Sequence[Any] = (),
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    single: bool = False,
    switch: tuple[Any, Any] | None = None,
) -> Any:
    """A configuration key with its help text and constraints; without ``default`` the key must be given.

    With ``single`` a list key also takes one value that is not in a list; ``switch`` is what false and true stand for,
    for a key that was a switch before it had more values.
    """
    info = SettingInfo(help=help, choices=tuple(choices), ge=ge, gt=gt, le=le, lt=lt, single=single, switch=switch)
    if factory is not None:
        return attrs.field(factory=factory, metadata={METADATA_KEY: info})
    return attrs.field(default=default, metadata={METADATA_KEY: info})


def setting_info(attribute: attrs.Attribute[Any]) -> SettingInfo:
    """The declaration behind an attrs attribute; an empty one for a plain attrs field."""
    info = attribute.metadata.get(METADATA_KEY)
    return info if isinstance(info, SettingInfo) else SettingInfo(help="")


@attrs.frozen(kw_only=True)
class InjectionConfig:
    """The keys that say where to inject; a strategy's config class extends it with what to inject.

    A class may define ``check``; the reader calls it and puts the key's path and source line before each problem.
    """

    target_keywords: tuple[str, ...] = setting((), help="Names of the projections to adapt, such as gate_proj")
    start_layer: int = setting(0, ge=0, help="First adapted layer, counted from 0")
    num_layers: int = setting(0, ge=0, help="How many layers to adapt from start_layer on; 0 = all")
    layer_indices: tuple[int, ...] = setting((), help="Adapt exactly these layers instead of a window")
    match: str = setting(
        "role",
        choices=("role", "exact"),
        help="role: the backbone adapter translates keywords; exact: names as they are",
    )
    allow_partial: bool = setting(
        False,
        help="Make warnings of what the injection refuses: a keyword that reaches nothing"
        " or only some of the chosen layers, a backbone that does not fit, modules of the vision tower",
    )

    def check(self) -> Iterable[Problem]:
        if self.layer_indices and (self.start_layer or self.num_layers):
            yield Problem(
                key="layer_indices",
                message="layer_indices and start_layer/num_layers exclude each other",
                hint="keep one of the two",
            )
        if len(set(self.layer_indices)) != len(self.layer_indices) or any(index < 0 for index in self.layer_indices):
            yield Problem(
                key="layer_indices", message="layer_indices must be distinct and not negative", hint="such as [0, 2, 4]"
            )
