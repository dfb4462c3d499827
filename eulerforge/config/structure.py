"""From a tree to attrs objects, strictly: nothing is converted that the writer did not mean, nothing passes unknown.

cattrs structures the leaves (``leaves``); the walk over the classes is ours, because all problems are wanted at once,
each with its dotted key.
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Mapping
from typing import Any

import attrs

from eulerforge.api.settings import setting_info
from eulerforge.config.leaves import WrongTypeError, describe, options_of, read_leaf
from eulerforge.config.suggest import nearest
from eulerforge.errors import Problem


def leaf_keys(config_class: type, prefix: str = "") -> list[str]:
    """The dotted keys of every value below a config class."""
    keys: list[str] = []
    for attribute in attrs.fields(attrs.resolve_types(config_class)):
        if attrs.has(attribute.type):
            keys += leaf_keys(attribute.type, f"{prefix}{attribute.name}.")
        else:
            keys.append(prefix + attribute.name)
    return keys


class Structurer:
    """Collects every problem of one tree.

    ``known`` are all dotted keys, for hints across sections, ``sections`` the names at the top.

    ``problems`` hold dotted keys without sources: the caller knows where each key was written.
    """

    def __init__(self, known: list[str], sections: set[str]) -> None:
        self.known = known
        self.sections = sections
        self.problems: list[Problem] = []

    def structure(self, config_class: type, tree: Any, prefix: str = "") -> Any:
        """An instance of ``config_class``, or None when something below it is wrong."""
        if not isinstance(tree, dict):
            names = ", ".join(attribute.name for attribute in attrs.fields(config_class))
            self._add(prefix.rstrip("."), f"a table is wanted, not {describe(tree)}", f"its keys are {names}")
            return None
        fields = {attribute.name: attribute for attribute in attrs.fields(attrs.resolve_types(config_class))}
        before = len(self.problems)
        unknown = [name for name in tree if name not in fields]
        for name in unknown:
            self._unknown(prefix + name, name, fields)
        # a misspelt key is said once, not also as the absent one that it means
        meant = {nearest(name, fields) for name in unknown}
        values: dict[str, Any] = {}
        for name, attribute in fields.items():
            if name in tree:
                values[name] = self._value(attribute, tree[name], prefix + name)
            elif attribute.default is attrs.NOTHING and name not in meant:
                self._add(prefix + name, "the key is required", f"--set {prefix}{name}=...")
        if len(self.problems) > before:
            return None
        return self._checked(config_class(**values), prefix)

    def _checked(self, instance: Any, prefix: str) -> Any:
        check = getattr(instance, "check", None)
        for problem in check() if callable(check) else ():
            self.problems.append(attrs.evolve(problem, key=prefix + problem.key if problem.key else prefix.rstrip(".")))
        return instance

    def _value(self, attribute: attrs.Attribute[Any], value: Any, key: str) -> Any:
        kind: Any = attribute.type
        (only, *others) = options_of(kind)
        if attrs.has(only) and not others and (value is not None or only is kind):
            return self.structure(only, value, key + ".")
        item = (typing.get_args(kind) or (None,))[0] if typing.get_origin(kind) in (tuple, list) else None
        if item is not None and attrs.has(item):
            if not isinstance(value, list):
                wanted = ", ".join(entry.name for entry in attrs.fields(item))
                self._add(key, f"a list of tables is wanted, not {describe(value)}", f"each has the keys {wanted}")
                return None
            made = typing.get_origin(kind)
            return made(self.structure(item, entry, f"{key}.{index}.") for index, entry in enumerate(value))
        info = setting_info(attribute)
        if info.single and not isinstance(value, list):
            value = [value]
        if info.switch is not None and isinstance(value, bool):
            value = info.switch[value]
        try:
            result = read_leaf(kind, value)
        except WrongTypeError as error:
            self._add(key, str(error), error.hint or _meaning(attribute))
            return None
        self._bounds(attribute, result, key)
        return result

    def _bounds(self, attribute: attrs.Attribute[Any], value: Any, key: str) -> None:
        info = setting_info(attribute)
        if value is None:
            return
        if info.choices and value not in info.choices:
            near = nearest(str(value), map(str, info.choices))
            allowed = ", ".join(map(str, info.choices))
            hint = f"did you mean {near}? allowed: {allowed}" if near else f"allowed: {allowed}"
            self._add(key, f"{value!r} is not allowed", hint)
        if isinstance(value, float) and not math.isfinite(value):
            self._add(key, f"the number must be finite, not {value}", _meaning(attribute))
            return
        for name, sign, holds in (
            ("ge", ">=", lambda bound: value >= bound),
            ("gt", ">", lambda bound: value > bound),
            ("le", "<=", lambda bound: value <= bound),
            ("lt", "<", lambda bound: value < bound),
        ):
            bound = getattr(info, name)
            if bound is not None and not holds(bound):
                self._add(key, f"{value} is out of range", f"{key} must be {sign} {bound:g}")

    def _unknown(self, key: str, name: str, siblings: Mapping[str, Any]) -> None:
        near = nearest(name, self.sections if key == name else siblings)
        if near is not None:
            hint = f"did you mean {key.removesuffix(name)}{near}?"
        else:
            by_leaf = {known.rpartition(".")[2]: known for known in reversed(self.known)}
            elsewhere = by_leaf.get(nearest(name, by_leaf) or "")
            hint = f"did you mean {elsewhere}?" if elsewhere else f"known keys here: {', '.join(siblings)}"
        self._add(key, f"unknown key {name!r}", hint)

    def _add(self, key: str, message: str, hint: str | None = None) -> None:
        self.problems.append(Problem(message=message, hint=hint, key=key or None))


def _meaning(attribute: attrs.Attribute[Any]) -> str:
    """What a key is for and what it is when nobody says anything: the hint where nothing nearer is known."""
    text = setting_info(attribute).help or "the key's type is fixed"
    default = attribute.default
    plain = isinstance(default, (bool, int, float, str)) or (isinstance(default, tuple) and default)
    return f"{text} (default: {json.dumps(default)})" if plain else text


def as_tree(instance: Any) -> dict[str, Any]:
    """Nested dicts and lists of a config object; keys whose value is None are left out."""

    def plain(value: Any) -> Any:
        if attrs.has(type(value)):
            return as_tree(value)
        if isinstance(value, Mapping):
            return dict(value)
        return [plain(entry) for entry in value] if isinstance(value, tuple | list) else value

    fields = attrs.fields(type(instance))
    pairs = ((attribute.name, getattr(instance, attribute.name)) for attribute in fields)
    return {name: plain(value) for name, value in pairs if value is not None}
