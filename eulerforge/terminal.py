"""Text from elsewhere on a person's terminal: a row, a preset, a file name or a plugin must not be able to steer it.

Notable: besides the C0 codes (ESC begins most sequences) the C1 codes are spelled out, of which U+009B does alone what
ESC [ does, and the marks that turn the direction of writing or end a line where no line feed stands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """The text with its control characters spelled out (``\\x1b``, ``\\u202e``); tabs and line feeds stay."""
    return _CONTROL.sub(_spelled, text)


def one_line(text: str, longest: int | None = None) -> str:
    """``harmless``, with line feeds and tabs spelled out too: what an error message may hold.

    Of more than ``longest`` characters the middle is left out.
    """
    if longest is not None and len(text) > longest:
        text = f"{text[: longest * 3 // 4]} ... {text[-longest // 4 :]}"
    return harmless(text).replace("\n", "\\n").replace("\t", "\\t")


def harmless_json(text: str) -> str:
    """JSON that was written with ``ensure_ascii=False``, of the same value, with the same characters as JSON escapes.

    JSON escapes the C0 codes itself; no character that is replaced here may stand outside of a string.
    """
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def strict(data: Any) -> Any:
    """What JSON can hold: null in place of NaN and infinity, which Python writes and JSON does not have."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: strict(value) for key, value in data.items()}
    return [strict(value) for value in data] if isinstance(data, list | tuple) else data


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
