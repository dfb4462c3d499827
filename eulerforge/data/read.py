"""Rows of JSON lines and JSON arrays, with the line on which each stands.

Notable: a line ends at ``\\n`` and nowhere else, as in every editor and in ``sed -n 7p``. Python's ``str.splitlines``
also splits at U+2028 and others, which JSON allows inside a string, and would cut rows and shift every later number.
A bad row does not stop the reading: it is noted in BadRows, and all that were found are shown at once.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from eulerforge.data.files import DataFile
from eulerforge.errors import DataError, EulerForgeError, Problem

SHOWN_PROBLEMS = 20
SHOWN_ALIKE = 5
"""Rows with the same fault that are shown in full; of the others lines are named, as many again."""
MEND = "mend that row, or delete it"
"""The hint where nothing nearer is known."""
_Fault = tuple[str, str | None, str]
_NUMBER = re.compile(r"\[[0-9]+\]")
_DECODE = json.JSONDecoder().raw_decode
_LINE_ENDS = ("\n", "", "\r\n")
_BOM = b"\xef\xbb\xbf"
_LINE_BITS = 32
_LINE = (1 << _LINE_BITS) - 1
_SHAPE_HINT = 'each line must be one JSON object, such as {"prompt": "...", "response": "..."}'


@attrs.define
class SourceRow:
    """One JSON object of a file; ``where`` is ``file:line``, and ``file:line[i]`` for element i of a JSON array.

    ``place`` is the same as one number, which grows from row to row (``place_text``).
    """

    data: dict[str, Any]
    place: int
    where: str

    @property
    def line(self) -> int:
        """The line on which the row begins."""
        return self.place & _LINE


def place_text(file: str, place: int) -> str:
    """``where`` of the row of a file that stands at ``place``."""
    element = place >> _LINE_BITS
    return f"{file}:{place & _LINE}" + (f"[{element - 1}]" if element else "")


def rows_before(place: int) -> int:
    """How many rows of its file stand before a place, at most."""
    return (place >> _LINE_BITS or place & _LINE) - 1


def places_text(sources: Sequence[str], count: int) -> str:
    """``lines 3, 9 of rows.jsonl and 40 more``, of ``count`` sources the first of which are given."""
    lines: dict[str, list[str]] = {}
    for source in sources:
        file, _, line = source.rpartition(":")
        lines.setdefault(file, []).append(line)
    named = [f"line{'s' * (len(of) > 1)} {', '.join(of)} of {file}" for file, of in lines.items()]
    rest = count - len(sources)
    return ", ".join(named) + (f" and {rest:,} more" if rest else "")


class BadRows:
    """Collects what is wrong with rows; keeps the first 20, 5 of a kind, and counts the rest."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.total = 0
        self._shown: Counter[_Fault] = Counter()
        self._alike: dict[_Fault, tuple[int, list[str]]] = {}

    def add(self, source: str, message: str, *, key: str | None = None, hint: str | None = None) -> None:
        self.total += 1
        hint = hint or MEND
        fault = message, key and _NUMBER.sub("[]", key), hint
        if self._shown[fault] >= SHOWN_ALIKE:
            count, sources = self._alike.get(fault, (0, []))
            self._alike[fault] = (count + 1, sources if len(sources) >= SHOWN_ALIKE else [*sources, source])
        elif len(self.problems) < SHOWN_PROBLEMS:
            self._shown[fault] += 1
            self.problems.append(Problem(message=message, source=source, key=key, hint=hint))

    def raise_if_any(self) -> None:
        """Raise :meth:`error` when there is anything to say."""
        if self.total:
            raise self.error()

    def error(self) -> EulerForgeError:
        """One DataError with every kept problem, and how many more there are."""
        shown = list(self.problems)
        for (message, key, hint), (count, sources) in self._alike.items():
            more = f"{message}: {count:,} more row{'s' * (count > 1)} like these: {places_text(sources, count)}"
            shown.append(Problem(message=more, key=key, hint=hint))
        rest = self.total - len(self.problems) - sum(count for count, _ in self._alike.values())
        if rest:
            more = f"{rest:,} more problems like these are not shown"
            shown.append(Problem(message=more, hint="mend the kinds that are shown, then look again"))
        return DataError.of(shown)


def read_rows(file: DataFile, bad: BadRows) -> Iterator[SourceRow]:
    """The rows of ``file`` in order. A ``.json`` file that begins with ``[`` is an array, all else is JSON lines."""
    if file.path.suffix.lower() == ".json":
        text = file.path.read_bytes()
        text = text.removeprefix(_BOM)
        if text.lstrip()[:1] == b"[":
            yield from _array(file, text, bad)
            return
        if _is_one_object(text):
            bad.add(f"{file.name}:1", "the file is one JSON object, not rows", hint="name a file of rows: .jsonl")
            return
    yield from _lines(file, bad)


def _lines(file: DataFile, bad: BadRows) -> Iterator[SourceRow]:
    with file.path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            where = f"{file.name}:{number}"
            if number == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    # Every further line would be reported too: one message says it all.
                    bad.add(where, "the file is UTF-16, not UTF-8", hint="save it as UTF-8")
                    return
                raw = raw.removeprefix(_BOM)
            if not raw.strip():
                continue
            try:
                value = _value(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                bad.add(where, _not_utf8(error), hint="save the file as UTF-8")
                continue
            except json.JSONDecodeError as error:
                bad.add(where, f"not valid JSON: {error.msg} at column {error.colno}", hint=_SHAPE_HINT)
                continue
            except (RecursionError, ValueError) as error:
                bad.add(where, f"JSON that cannot be read: {error}")
                continue
            if isinstance(value, dict):
                yield SourceRow(value, number, where)
            else:
                bad.add(where, f"a row must be a JSON object, this is {json_type(value)}", hint=_line_hint(value))


def _value(text: str) -> Any:
    """``json.loads``, at half its time for a line that is one value and a line break; all else it decides itself."""
    try:
        value, end = _DECODE(text)
    except ValueError:
        return json.loads(text)
    return value if text[end:] in _LINE_ENDS else json.loads(text)


def _array(file: DataFile, raw: bytes, bad: BadRows) -> Iterator[SourceRow]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = raw.count(b"\n", 0, error.start) + 1
        bad.add(f"{file.name}:{wrong}", _not_utf8(error), hint="save the file as UTF-8")
        return
    decoder = json.JSONDecoder()
    position = _skip(text, text.index("[") + 1)
    line, counted, index = 1, 0, 0
    while True:
        if text[position : position + 1] == "]" and index == 0:
            break
        line += text.count("\n", counted, position)
        counted = position
        where = f"{file.name}:{line}[{index}]"
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            bad.add(f"{file.name}:{error.lineno}[{index}]", f"not valid JSON: {error.msg} at column {error.colno}")
            return
        except (RecursionError, ValueError) as error:
            bad.add(where, f"JSON that cannot be read: {error}")
            return
        if isinstance(value, dict):
            yield SourceRow(value, (index + 1) << _LINE_BITS | line, where)
        else:
            bad.add(where, f"a row must be a JSON object, this is {json_type(value)}")
        index += 1
        position = _skip(text, end)
        mark = text[position : position + 1]
        if mark == "]":
            break
        if mark != ",":
            wrong = text.count("\n", 0, position) + 1
            bad.add(f"{file.name}:{wrong}[{index - 1}]", "not valid JSON: a comma or ] is missing after this element")
            return
        position = _skip(text, position + 1)
    rest = _skip(text, position + 1)
    if rest < len(text):
        bad.add(f"{file.name}:{text.count(chr(10), 0, rest) + 1}", "there is text after the end of the array")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _not_utf8(error: UnicodeDecodeError) -> str:
    column = error.start - error.object.rfind(b"\n", 0, error.start)
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {column} of the line"


def _is_one_object(text: bytes) -> bool:
    """Whether the file is one object over several lines, which as JSON lines would be wrong on every line."""
    if b"\n" not in text.strip():
        return False
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _line_hint(value: Any) -> str:
    if isinstance(value, list):
        return "a file that is one JSON array must be named .json"
    return _SHAPE_HINT


def json_type(value: Any) -> str:
    """What a JSON value is, in the words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "an object"
