"""One value of a preset as the type that its key declares: nothing is converted that the writer did not mean.

cattrs walks lists and tables; the hooks refuse what it would quietly convert: text as a list of letters, 1.5 as 1, a
tuple of another length, an option of a union that merely accepts the value, a key that a class does not have.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from datetime import date, time
from enum import Enum
from typing import Any

import cattrs

from eulerforge.config.suggest import nearest

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_COLLECTIONS: dict[Any, Any] = {tuple: tuple, list: list, Sequence: tuple, set: set, frozenset: frozenset}
_UNIONS = (typing.Union, types.UnionType)


class WrongTypeError(Exception):
    """The value is of another type; ``hint`` says how to write it, where that is known."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


def describe(value: Any) -> str:
    """A value as its writer would call it."""
    if isinstance(value, bool):
        return f"{str(value).lower()}"
    if isinstance(value, str):
        return f"the text {value!r}"
    if value is None:
        return "null"
    if isinstance(value, date | time):
        return f"the date or time {value.isoformat()}"
    return "a table" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)


def options_of(kind: Any) -> list[Any]:
    """The types that a value may have, None left out; one unless ``kind`` is a union of several."""
    if typing.get_origin(kind) not in _UNIONS:
        return [kind]
    return [option for option in typing.get_args(kind) if option is not types.NoneType]


def read_leaf(kind: Any, value: Any) -> Any:
    """``value`` as ``kind``. Raises WrongTypeError."""
    try:
        return _CONVERTER.structure(value, kind)
    except WrongTypeError:
        raise
    except Exception as error:
        raise WrongTypeError(f"{describe(value)} cannot be read as {_name(kind)}: {error}") from error


def _name(kind: Any) -> str:
    if kind in _KINDS:
        return _KINDS[kind]
    origin = typing.get_origin(kind) or kind
    if origin in _COLLECTIONS:
        return "a list"
    if origin in (Mapping, dict):
        return "a table"
    return str(getattr(kind, "__name__", kind))


def _strict(kind: type) -> Callable[[Any, type], Any]:
    def hook(value: Any, _: type) -> Any:
        if kind is float and type(value) is int:
            try:
                return float(value)
            except OverflowError:
                raise WrongTypeError("the number is too large") from None
        if value is None:
            raise WrongTypeError("a value is wanted, not null")
        if type(value) is not kind:
            raise WrongTypeError(f"{_KINDS[kind]} is wanted, not {describe(value)}", _as_written(kind, value))
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise WrongTypeError("half of a surrogate pair is no text", "write the character itself")
        return value

    return hook


def _as_written(kind: type, value: Any) -> str | None:
    """How a value that another language or format spells in its own way is written here."""
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return f"write {value.lower()}, without quotes"
    return f'write "{value.isoformat()}" in quotes' if kind is str and isinstance(value, date | time) else None


def _sequence(kind: Any) -> Callable[[Any, Any], Any]:
    made = _COLLECTIONS[typing.get_origin(kind) or kind]
    items = typing.get_args(kind) or (Any,)
    fixed = typing.get_origin(kind) is tuple and Ellipsis not in items

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise WrongTypeError(f"a list is wanted, not {describe(value)}", hint=f"write {_as_list(items[0], value)}")
        if fixed and len(value) != len(items):
            raise WrongTypeError(f"a list of {len(items)} values is wanted, not of {len(value)}")
        wanted_items = items if fixed else items[:1] * len(value)
        return made(_CONVERTER.structure(entry, item) for entry, item in zip(value, wanted_items, strict=True))

    return hook


def _as_list(item: Any, value: Any) -> str:
    """How a value that is no list would be written as one; commas between words part them."""
    if not isinstance(value, str):
        return "[...]" if isinstance(value, dict | None) else f"[{json.dumps(value, default=str)}]"
    parts = [part.strip() for part in value.split(",")]
    if any(not part or " " in part for part in parts):
        parts = [value]
    return f"[{', '.join(parts)}]" if item in (int, float) else json.dumps(parts, ensure_ascii=False)


def _mapping(kind: Any) -> Callable[[Any, Any], dict[str, Any]]:
    name_kind, item = typing.get_args(kind) or (Any, Any)

    def hook(value: Any, _: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise WrongTypeError(f"a table is wanted, not {describe(value)}")
        pairs = ((_CONVERTER.structure(name, name_kind), entry) for name, entry in value.items())
        return {name: _CONVERTER.structure(entry, item) for name, entry in pairs}

    return hook


def _union(kind: Any) -> Callable[[Any, Any], Any]:
    options = options_of(kind)
    optional = len(options) < len(typing.get_args(kind))

    def hook(value: Any, _: Any) -> Any:
        if value is None and optional:
            return None
        if len(options) == 1:
            return read_leaf(options[0], value)
        # the type that it is, before one that it would be turned into: 1 stays whole in float | int
        for option in sorted(options, key=lambda option: type(value) is not option):
            try:
                return read_leaf(option, value)
            except WrongTypeError:
                continue
        raise WrongTypeError(f"{' or '.join(map(_name, options))} is wanted, not {describe(value)}")

    return hook


def _literal(kind: Any) -> Callable[[Any, Any], Any]:
    allowed = typing.get_args(kind)

    def hook(value: Any, _: Any) -> Any:
        written = [one.value if isinstance(one, Enum) else one for one in allowed]
        for one, plain in zip(allowed, written, strict=True):
            if type(plain) is type(value) and plain == value:
                return one
        near = nearest(str(value), map(str, written))
        listed = f"allowed: {', '.join(map(str, written))}"
        raise WrongTypeError(f"{value!r} is not allowed", f"did you mean {near}? {listed}" if near else listed)

    return hook


_CONVERTER = cattrs.Converter(detailed_validation=False, forbid_extra_keys=True)
for _kind in _KINDS:
    _CONVERTER.register_structure_hook(_kind, _strict(_kind))
for _origins, _factory in (
    (tuple(_COLLECTIONS), _sequence),
    ((Mapping, dict), _mapping),
    (_UNIONS, _union),
    ((typing.Literal,), _literal),
):
    _CONVERTER.register_structure_hook_factory(
        lambda kind, origins=_origins: (typing.get_origin(kind) or kind) in origins, _factory
    )
