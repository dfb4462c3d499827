"""A config class as a table of keys: what ``plugins show`` prints and ``plugins check`` examines."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Iterator
from typing import Any

import attrs

from eulerforge.api.settings import setting_info


@attrs.frozen(kw_only=True)
class Key:
    """One key: its dotted name, its type as a person writes it, its default and its help text.

    ``default`` is ready for JSON; with ``required`` there is none.
    """

    name: str
    type: str
    default: Any
    required: bool
    help: str
    choices: tuple[Any, ...] = ()

    @property
    def default_text(self) -> str:
        if self.required:
            return "required"
        return "not set" if self.default is None else json.dumps(self.default, ensure_ascii=False, default=str)


def describe_keys(config: type, prefix: str = "") -> Iterator[Key]:
    """The keys of an attrs class, those of nested classes dotted, in the order of their definition.

    Raises:
        NameError: an annotation cannot be resolved.
    """
    attrs.resolve_types(config)
    for attribute in attrs.fields(config):
        name, kind = prefix + attribute.name, attribute.type
        if isinstance(kind, type) and attrs.has(kind):
            yield from describe_keys(kind, name + ".")
            continue
        info = setting_info(attribute)
        yield Key(
            name=name,
            type=type_text(kind),
            default=_default(attribute),
            required=attribute.default is attrs.NOTHING,
            help=info.help,
            choices=info.choices,
        )


def type_text(kind: Any) -> str:
    """``tuple[str, ...]`` as ``list of str``, ``int | None`` as ``int or none``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(part) for part in arguments)
    if kind is type(None):
        return "none"
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"list of {type_text(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {', '.join(type_text(part) for part in arguments)}"
    if inspect.isclass(kind) and origin is None:
        return kind.__name__
    return str(kind).replace("typing.", "").replace("collections.abc.", "")


def _default(attribute: attrs.Attribute[Any]) -> Any:
    default = attribute.default
    if default is attrs.NOTHING:
        return None
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        default = None if default.takes_self else default.factory()  # type: ignore[union-attr]
    if default is not None and attrs.has(type(default)):
        return attrs.asdict(default)
    return list(default) if isinstance(default, tuple) else default
