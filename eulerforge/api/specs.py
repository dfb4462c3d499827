"""Frozen declarations that a plugin's hooks return; a target is imported only when a run names it."""

from __future__ import annotations

import re
from collections.abc import Iterable

import attrs

ISOLATIONS = ("none", "attention", "gather")

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def _check_name(_: object, attribute: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"{attribute.name} {value!r} must be lower-case letters, digits, '.', '_' or '-'")


def _check_target(_: object, attribute: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not _TARGET.fullmatch(value):
        raise ValueError(f"{attribute.name} {value!r} must be of the form 'package.module:attribute'")


def _check_inside(_: object, attribute: attrs.Attribute[str], value: str) -> None:
    if value.startswith(("/", "\\")) or ".." in value.replace("\\", "/").split("/"):
        raise ValueError(f"{attribute.name} {value!r} must lie inside the package")


def _names(values: Iterable[str]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise ValueError(f"a list of names is wanted, not the single text {values!r}")
    names = tuple(values)
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"a list of names is wanted, and {name!r} is none")
    return names


@attrs.frozen(kw_only=True)
class Spec:
    """What every offer says of itself.

    ``target`` is ``"package.module:attribute"``, a class without constructor arguments or an object.
    """

    name: str = attrs.field(validator=_check_name)
    target: str = attrs.field(validator=_check_target)
    summary: str = attrs.field(validator=attrs.validators.instance_of(str))
    aliases: tuple[str, ...] = attrs.field(default=(), converter=_names)
    docs_url: str | None = None


@attrs.frozen(kw_only=True)
class BackboneSpec(Spec):
    """A backbone adapter.

    ``model_types`` are the Hugging Face ``config.model_type`` values that the adapter covers fully.
    ``partial_model_types`` are accepted when named, although keywords reach only a part of the layers:
    the run warns and says which.
    ``roles`` are the roles that the adapter knows.
    ``isolation`` says how documents that lie in one packed row can be kept apart:
    ``attention``: tokens meet nowhere but in attention that goes through transformers' attention interface;
    ``gather``: besides, in the modules that the adapter's ``find_sequence_mixers`` names;
    ``none``: unknown, so that rows of this family are padded, never packed.
    """

    model_types: tuple[str, ...] = attrs.field(converter=_names)
    partial_model_types: tuple[str, ...] = attrs.field(default=(), converter=_names)
    roles: tuple[str, ...] = attrs.field(default=(), converter=_names)
    isolation: str = attrs.field(default="none", validator=attrs.validators.in_(ISOLATIONS))


@attrs.frozen(kw_only=True)
class StrategySpec(Spec):
    """An injection strategy.

    ``config_target`` names a light attrs class that extends ``InjectionConfig`` and owns the strategy's keys.
    ``groups`` are the phase groups that the injected parameters fall into.
    ``stored_weights`` says that neither it nor its wrappers read values of a linear module's ``weight`` or of fused
    experts, which a CPU without bf16 products may store as bf16 beside fp32 states: they call the module, and read
    through ``context.linear_ops``. Without it such weights are fp32 before it is asked, at twice the memory.
    """

    config_target: str = attrs.field(validator=_check_target)
    groups: tuple[str, ...] = attrs.field(default=(), converter=_names)
    stored_weights: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))


@attrs.frozen(kw_only=True)
class PhaseGroupSpec(Spec):
    """A phase-group resolver and the groups that it can name parameters for."""

    groups: tuple[str, ...] = attrs.field(converter=_names)


@attrs.frozen(kw_only=True)
class PresetSpec:
    """A preset file inside a plugin's package: ``file`` is relative to ``package`` and stays below it."""

    name: str = attrs.field(validator=_check_name)
    package: str = attrs.field(validator=attrs.validators.instance_of(str))
    file: str = attrs.field(validator=_check_inside)
    summary: str = attrs.field(default="", validator=attrs.validators.instance_of(str))
