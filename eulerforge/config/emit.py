"""A configuration as TOML text, with where each value came from as a comment; it reads back as a preset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from eulerforge.terminal import harmless_json


def toml_text(tree: Mapping[str, Any], provenance: Mapping[str, str] | None = None) -> str:
    """TOML of a tree of tables, lists and scalars."""
    lines: list[str] = []
    _table(tree, "", provenance, lines)
    return "\n".join(lines).strip() + "\n"


def _table(tree: Mapping[str, Any], prefix: str, provenance: Mapping[str, str] | None, lines: list[str]) -> None:
    tables = {name: value for name, value in tree.items() if isinstance(value, Mapping)}
    for name, value in tree.items():
        if name not in tables:
            origin = (provenance or {}).get(f"{prefix}{name}")
            lines.append(f"{_key(name)} = {_value(value)}" + (f"  # {origin}" if origin else ""))
    for name, table in tables.items():
        if table:
            origin = (provenance or {}).get(f"{prefix}{name}")
            header = ".".join(_key(part) for part in f"{prefix}{name}".split("."))
            lines += ["", f"[{header}]" + (f"  # {origin}" if origin else "")]
            _table(table, f"{prefix}{name}.", provenance, lines)


def _key(name: str) -> str:
    return (
        name
        if name.replace("_", "a").replace("-", "a").isalnum() and name.isascii()
        else harmless_json(json.dumps(name, ensure_ascii=False))
    )


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's escapes are TOML's; DEL, which TOML wants escaped, is among those that harmless_json replaces
        return harmless_json(json.dumps(value, ensure_ascii=False))
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(name)} = {_value(entry)}" for name, entry in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_value(entry) for entry in value) + "]"
    return repr(value)
