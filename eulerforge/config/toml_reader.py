"""TOML with line numbers: tomli reads the values, a small scanner finds the line of each key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tomli

from eulerforge.config.document import MAX_DEPTH
from eulerforge.errors import ConfigError

_KEY = re.compile(
    r"""\s*((?:"(?:[^"\\]|\\.)*"|'[^']*'|[A-Za-z0-9_-]+)(?:\s*\.\s*(?:"(?:[^"\\]|\\.)*"|'[^']*'|[A-Za-z0-9_-]+))*)\s*="""
)
_TABLE = re.compile(r"\s*(\[\[?)([^\[\]]+)\]\]?\s*(?:#.*)?$")
_PART = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*\.?""")
_HUGE = re.compile(r"[0-9_]{4301}")
_PLACE = re.compile(r" \(at line (\d+), column \d+\)$")
_STRING = re.compile(r'''"""(?:[^\\]|\\.)*?"""|\'\'\'.*?\'\'\'|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|#[^\n]*''', re.DOTALL)


def read_toml(text: str, path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The tree and the line of each key.

    Raises:
        ConfigError: with the line, for malformed TOML and duplicate keys.
    """
    try:
        tree = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        line = getattr(error, "lineno", None)
        message = getattr(error, "msg", None) or str(error)
        if line is None and (place := _PLACE.search(message)):  # tomli before 2.3
            line = int(place[1])
        raise ConfigError(
            _PLACE.sub("", message),
            source=f"{path}:{line}" if line else str(path),
            key=_key_on(text, line) if line else None,
            hint="each key stands once, as key = value" if "overwrite" in message else "see https://toml.io",
        ) from None
    except RecursionError:
        raise ConfigError(
            "the preset is nested too deeply", source=str(path), hint=f"{MAX_DEPTH} levels at most"
        ) from None
    except ValueError:  # Python reads no integer of so many digits: the time grows with their square
        line = 1 + text[: found.start()].count("\n") if (found := _HUGE.search(text)) else 0
        raise ConfigError(
            "a number of more than 4,300 digits",
            source=f"{path}:{line}" if line else str(path),
            key=_key_on(text, line) if line else None,
            hint="no setting needs one",
        ) from None
    if _depth(tree) > MAX_DEPTH:
        raise ConfigError("the preset is nested too deeply", source=str(path), hint=f"{MAX_DEPTH} levels at most")
    return tree, key_lines(text)


def key_lines(text: str) -> dict[str, int]:
    """The 1-based line of every key of a well-formed TOML text; keys of inline tables have their table's line."""
    # strings may hold anything, and comments too: blank them out, keeping quotes of keys and all line breaks
    lines: dict[str, int] = {}
    table: tuple[str, ...] = ()
    counts: dict[tuple[str, ...], int] = {}
    depth = 0
    for number, line in enumerate(_without_values(text).split("\n"), 1):
        if depth == 0:
            if header := _TABLE.match(line):
                table = _parts(header[2])
                if header[1] == "[[":
                    counts[table] = counts.get(table, -1) + 1
                    table = (*table, str(counts[table]))
                for end in range(1, len(table) + 1):
                    lines.setdefault(".".join(table[:end]), number)
                continue
            if key := _KEY.match(line):
                full = (*table, *_parts(key[1]))
                for end in range(len(table) + 1, len(full) + 1):
                    lines.setdefault(".".join(full[:end]), number)
                line = line[key.end() :]
        depth += sum(line.count(character) for character in "[{") - sum(line.count(character) for character in "]}")
    return lines


def _key_on(text: str, number: int) -> str | None:
    """The dotted key that begins on a line of a malformed text, as far as that can be told."""
    lines = _without_values(text).split("\n")[:number]
    key = _KEY.match(lines[-1])
    header = next((found for line in reversed(lines) if (found := _TABLE.match(line))), None)
    table = _parts(header[2]) if header else ()
    return (
        ".".join((*table, *_parts(key[1]))) if key else ".".join(table) if header and _TABLE.match(lines[-1]) else None
    )


def _depth(tree: Any) -> int:
    """How many tables and lists lie within each other; level by level, so that no depth can break it."""
    depth, level = 0, [tree]
    while level := [item for node in level if isinstance(node, (dict, list)) for item in _items(node)]:
        depth += 1
        if depth > MAX_DEPTH:
            break
    return depth


def _items(node: dict[str, Any] | list[Any]) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node


def _parts(key: str) -> tuple[str, ...]:
    return tuple(next(group for group in match.groups() if group is not None) for match in _PART.finditer(key))


def _without_values(text: str) -> str:
    """The text with the content of value strings and comments blanked, line by line the same."""

    def blank(match: re.Match[str]) -> str:
        found = match[0]
        if found.startswith("#"):
            return ""
        after = text[match.end() :].lstrip(" \t")[:1]
        before = text[: match.start()].rpartition("\n")[2]
        is_key = after in ("=", ".", "]") and "=" not in before and "\n" not in found
        return found if is_key else '""' + "\n" * found.count("\n")

    return _STRING.sub(blank, text)
