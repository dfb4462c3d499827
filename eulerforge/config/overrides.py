"""``--set key=value``: scalars and lists of TOML or JSON; a bare word is text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import tomli

from eulerforge.errors import ConfigError, Problem

SOURCE = "--set"
_BARE_LIST = re.compile(r"\[[^\[\]{}\"'=]*\]")


def parse_override(text: str) -> tuple[str, Any]:
    """``"training.lr=2e-5"`` as ("training.lr", 2e-05).

    Raises:
        ConfigError: there is no ``=``, or no key before it.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"{text!r} is not of the form KEY=VALUE", source=SOURCE, hint="--set training.lr=2e-5")
    return key, parse_value(value.strip())


def parse_value(text: str) -> Any:
    """A TOML value, else a JSON value, else a list of bare words, else the text itself."""
    if "\n" not in text:
        try:
            value = tomli.loads(f"v = {text}")["v"]
            if isinstance(value, (bool, int, float, str, list, dict)):
                return value
        except (ValueError, RecursionError):  # malformed, or an integer of too many digits
            pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if _BARE_LIST.fullmatch(text):
        return [parse_value(item.strip()) for item in text[1:-1].split(",") if item.strip()]
    return text


def apply_overrides(tree: dict[str, Any], sets: Sequence[str]) -> tuple[set[str], list[Problem]]:
    """Put every override into ``tree``, later ones over earlier ones; give back the keys and what was wrong."""
    keys: set[str] = set()
    problems: list[Problem] = []
    for text in sets:
        try:
            key, value = parse_override(text)
        except ConfigError as error:
            problems += error.problems
            continue
        *parents, last = key.split(".")
        node: Any = tree
        for depth, part in enumerate(parents, 1):
            if not isinstance(node.setdefault(part, {}), dict):
                where = ".".join(parents[:depth])
                message = f"{where} is a value, not a table"
                hint = f"leave out --set {where}=..., or write the keys below it only"
                if isinstance(node[part], list):
                    message, hint = f"{where} is a list, which is set as a whole", f"--set '{where}=[...]'"
                problems.append(Problem(message=message, key=key, source=SOURCE, hint=hint))
                break
            node = node[part]
        else:
            node[last] = value
            keys.add(key)
    return keys, problems
