"""The row kinds: which keys each of them has, and what to say of an object that is none of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from eulerforge.data.turns import BadRow, names_of

# The keys that a kind needs, most telling first; the first kind whose keys are all there wins.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("messages", ("messages",)),
    ("conversations", ("conversations",)),
    ("prompt/response", ("prompt", "response")),
    ("prompt/completion", ("prompt", "completion")),
    ("instruction/output", ("instruction", "output")),
    ("text", ("text",)),
)
_ALL_KEYS = {**dict(KINDS), "instruction/output": ("instruction", "output", "input")}
"""Those that a kind can do without, too."""
_OTHER_NAMES = {
    "prompt": ("question", "query", "instruction"),
    "response": ("answer", "output"),
    "input": ("context",),
    "output": ("response", "answer", "completion"),
}
"""How other tools' files name what a key holds."""


def columns_of(kind: str, columns: Mapping[str, str]) -> set[str]:
    """The columns that rows of a kind have; ``columns`` are the file's names of our keys, here and below."""
    return {columns[key] for key in _ALL_KEYS[kind]}


def kind_of(names: Collection[str], columns: Mapping[str, str]) -> str | None:
    """The kind of a row with these columns."""
    return next((kind for kind, keys in KINDS if all(columns[key] in names for key in keys)), None)


def no_kind(data: Mapping[str, Any], columns: Mapping[str, str]) -> BadRow:
    """The most helpful thing to say of an object that is no row: what its nearest kind misses, else all kinds.

    The nearest kind is one that is whole once columns are mapped, and takes most of the row's columns.
    """
    best, nearest = (False, 0, 0), ""
    for kind, keys in KINDS:
        mapped, known = _mapped(data, kind, columns), _ALL_KEYS[kind]
        there = [key for key in known if columns[key] in data]
        whole = all(key in there or key in mapped for key in keys)
        score = (whole, len(there) + len(mapped), min(len(data), len(known)))
        if score > best and (whole or set(there) & set(keys)):
            best, nearest = score, kind
    if nearest:
        return _half(data, nearest, columns)
    if columns["input_ids"] in data:
        return BadRow("the row holds token ids", columns["input_ids"], "--set data.format=processed")
    return BadRow(
        f"no known row kind; it has {names_of(data) or 'no keys'}",
        hint="rows are {prompt, response}, {text}, {messages}, {instruction, input, output} or {conversations}; "
        "map other names, such as --set data.schema.prompt=question",
    )


def _mapped(data: Mapping[str, Any], kind: str, columns: Mapping[str, str]) -> dict[str, str]:
    """Keys of a kind that the row lacks, and its columns that are named as other tools name these."""
    free = [name for name in data if name not in columns_of(kind, columns)]
    named = {key: next((name for name in _OTHER_NAMES.get(key, ()) if name in free), "") for key in _ALL_KEYS[kind]}
    return {key: name for key, name in named.items() if name and columns[key] not in data}


def _half(data: Mapping[str, Any], kind: str, columns: Mapping[str, str]) -> BadRow:
    """What to say of a row that has a part of a kind's columns."""
    missing = next(key for key in dict(KINDS)[kind] if columns[key] not in data)
    others = [name for name in data if name not in columns_of(kind, columns)]
    mapped = _mapped(data, kind, columns)
    if missing in mapped:
        options = " ".join(f"--set data.schema.{key}={name}" for key, name in mapped.items())
        hint = f"map the file's columns: {options}"
    elif missing == "instruction" and columns["input"] in data and not others:
        options = " ".join(
            f"--set data.schema.{key}={columns[ours]}" for key, ours in (("prompt", "input"), ("response", "output"))
        )
        hint = f"a row of a question and its answer alone: {options}"
    else:
        hint = f"map the file's column: --set data.schema.{missing}=COLUMN"
        hint += f" (this row also has {names_of(others)})" if others else ""
    return BadRow("is missing", columns[missing], hint)
