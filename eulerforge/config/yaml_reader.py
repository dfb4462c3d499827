"""YAML with line numbers, and without YAML 1.1's surprises.

Values are built from the nodes of PyYAML's safe loader; no tag beyond the plain ones is ever constructed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from eulerforge.config.document import MAX_DEPTH
from eulerforge.errors import ConfigError, Problem

_EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
_INTEGER = re.compile(r"[-+]?(0|[1-9]\d*)")
_FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_DIGITS = 4300  # Python reads no longer integers: the time grows with the square of their length
MAX_EVENTS = 20_000
_TAG = "tag:yaml.org,2002:"
MEND = "look at that line and the one before it: indentation, quotes, brackets"


def read_yaml(text: str, path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The tree and the line of each key.

    Raises:
        ConfigError: malformed YAML, and all surprising values at once.
    """
    try:
        _bound(text, path)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        hint = "indent with spaces: YAML takes no tabs" if "'\\t'" in (error.problem or "") else MEND
        raise ConfigError(error.problem or "malformed YAML", source=where, hint=hint) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"malformed YAML: {str(error).splitlines()[0]}", source=str(path), hint=MEND) from None
    if node is None:
        return {}, {}
    builder = _Builder(path)
    tree = builder.value(node, "")
    if not isinstance(tree, dict):
        raise ConfigError("a preset is a mapping of keys", source=f"{path}:1", hint="write key: value lines")
    if builder.problems:
        raise ConfigError.of(builder.problems)
    return tree, builder.lines


def _bound(text: str, path: Path) -> None:
    """Refuse aliases, deep nesting and huge numbers of values before anything is built."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if number > MAX_EVENTS:
            raise ConfigError(
                f"the preset holds more than {MAX_EVENTS:,} keys and values",
                source=f"{path}:{line}",
                hint="rows belong into a data file",
            )
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(
                f"the alias *{event.anchor} is refused: presets have no aliases",
                source=f"{path}:{line}",
                hint="write the value out",
            )
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
            if depth > MAX_DEPTH:
                raise ConfigError(
                    "the preset is nested too deeply", source=f"{path}:{line}", hint=f"{MAX_DEPTH} levels at most"
                )
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1


class _Builder:
    """Plain values from nodes; what is refused is collected in ``problems``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, int] = {}
        self.problems: list[Problem] = []

    def value(self, node: yaml.Node, key: str) -> Any:
        if key:
            self.lines.setdefault(key, node.start_mark.line + 1)
        if node.tag.removeprefix(_TAG) not in _KNOWN_TAGS:
            self._refuse(node, key, f"the tag {node.tag} is refused", "presets hold plain values only")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, f"{key}.{index}") for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)  # noqa: S101 - the only other kind of node
        return self._scalar(node, key)

    def _mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            full = f"{key}.{name}" if key else name
            if not name:
                self._refuse(key_node, key, "a key must be a plain word")
            elif name in tree:
                self._refuse(key_node, full, "the key stands twice", f"the first is on line {self.lines[full]}")
            else:
                self.lines[full] = key_node.start_mark.line + 1
                tree[name] = self.value(value_node, full)
        return tree

    def _scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        text, tag = node.value, node.tag.removeprefix(_TAG)
        if node.style in ("'", '"', "|", ">") or (tag == "str" and not _EXPONENT.fullmatch(text)):
            return text
        if tag == "null":
            return None
        if tag == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if tag == "int" and len(text) > _DIGITS:
            self._refuse(node, key, f"a number of more than {_DIGITS:,} digits", "no setting needs one")
            return None
        if tag == "int" and _INTEGER.fullmatch(text):
            return int(text)
        if tag in ("float", "str") and (_FLOAT.fullmatch(text) or _EXPONENT.fullmatch(text)):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        meant = f"YAML 1.1 would read {text} as {_MEANINGS.get(tag, tag)}"
        otherwise = "true or false" if tag == "bool" else "a plain decimal number"
        self._refuse(node, key, meant, f"write '{text}' in quotes for text, or {otherwise}")
        return None

    def _refuse(self, node: yaml.Node, key: str, message: str, hint: str | None = None) -> None:
        source = f"{self.path}:{node.start_mark.line + 1}"
        self.problems.append(Problem(message=message, hint=hint, key=key or None, source=source))


_KNOWN_TAGS = ("map", "seq", "str", "null", "bool", "int", "float", "timestamp", "merge")
_MEANINGS = {"bool": "a truth value", "int": "another number", "float": "another number", "timestamp": "a date"}
