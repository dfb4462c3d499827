"""A preset file as a tree in which every key knows its line.

Notable: what a reader would take in another way than it is written is refused, not guessed: duplicate keys, YAML's
``on`` and ``no``, ``012``, ``1:30``, dates; and what could grow without bound: aliases, deep nesting, huge files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from eulerforge.errors import ConfigError

MAX_BYTES = 1 << 17
# a hundred times what a long preset needs; PyYAML reads it in seconds
MAX_DEPTH = 32


@attrs.frozen(kw_only=True)
class Document:
    """``tree`` as plain dicts, lists and scalars; ``lines`` maps a dotted key to its 1-based line."""

    path: Path
    tree: dict[str, Any]
    lines: Mapping[str, int]

    def source(self, key: str) -> str:
        """``file:line`` of a key, or of the nearest table around it."""
        parts = key.split(".")
        while parts:
            if (line := self.lines.get(".".join(parts))) is not None:
                return f"{self.path}:{line}"
            parts.pop()
        # a key that stands nowhere would stand at the top
        return f"{self.path}:1" if self.lines else str(self.path)


def read_document(path: Path) -> Document:
    """Read a TOML (``.toml``) or YAML (``.yml``, ``.yaml``) file.

    Raises:
        ConfigError: the file is not readable, too large, not UTF-8, or not well formed; every problem has its line.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"the preset is larger than {MAX_BYTES} bytes", source=str(path), hint="rows belong into a data file"
            )
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the preset is not UTF-8 (byte {error.start})", source=str(path), hint="save it as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"the preset cannot be read: {error.strerror}", source=str(path), hint="give a file that you can read"
        ) from None
    if path.suffix == ".toml":
        from eulerforge.config.toml_reader import read_toml

        return Document(path=path, tree=(found := read_toml(text, path))[0], lines=found[1])
    if path.suffix in (".yml", ".yaml"):
        from eulerforge.config.yaml_reader import read_yaml

        return Document(path=path, tree=(found := read_yaml(text, path))[0], lines=found[1])
    raise ConfigError(
        f"a preset ends in .toml, .yml or .yaml, not {path.suffix or 'in nothing'}",
        source=str(path),
        hint="rename it after what is in it",
    )
