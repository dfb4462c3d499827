"""Rows of every kind, and every way to spoil one: the key at fault is known, the line is chosen by the test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import attrs

GOOD: dict[str, dict[str, Any]] = {
    "prompt/response": {"prompt": "Who?", "response": "Me."},
    "text": {"text": "Once upon a time."},
    "instruction": {"instruction": "Add.", "input": "1 2", "output": "3"},
    "messages": {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "Me."},
        ]
    },
    "conversations": {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
}
COMPLETION = {"prompt": "Who?", "completion": "Me."}
"""TRL's row; without its second half it is taken for one that lacks a response."""
PROCESSED = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]}
WRONG_TEXT: tuple[Any, ...] = (None, True, 3, 1.5, [], ["a"], {}, {"a": "b"}, 10**30, -0.0)
WRONG_LIST: tuple[Any, ...] = (None, True, 3, "text", {}, {"0": "a"})


@attrs.frozen(kw_only=True)
class BadLine:
    """``raw`` is a line without its end; ``key`` is what the message must name, empty where no key is at fault."""

    kind: str
    raw: bytes
    key: str = ""


def bad_lines() -> Iterator[BadLine]:
    """Lines that are no row of raw data, each wrong in one way."""
    yield from malformed()
    for row in GOOD.values():
        yield from _wrong_types(row)
        yield from _missing(row)
        yield from _misspelt(row)
    yield from _wrong_types(COMPLETION)
    for kind, column, role, content in (
        ("messages", "messages", "role", "content"),
        ("conversations", "conversations", "from", "value"),
    ):
        turns = GOOD[kind][column]
        for index in range(len(turns)):
            place = f"{column}[{index}]"
            for wrong in (None, "text", 3, [], True):
                yield _line("turn is no object", {column: _with(turns, index, wrong)}, place)
            for name in (role, content):
                for wrong in WRONG_TEXT:
                    yield _line("turn's type", {column: _with(turns, index, {**turns[index], name: wrong})}, place)
                rest = {key: value for key, value in turns[index].items() if key != name}
                yield _line("turn's key missing", {column: _with(turns, index, rest)}, f"{place}.{name}")
            for stranger in ("tool", "Users", "", "assistant ", "bot", "\x1b[31m"):
                turn = {**turns[index], role: stranger}
                yield _line("unknown role", {column: _with(turns, index, turn)}, f"{place}.{role}")
        yield _line("no assistant", {column: turns[:-1]}, column)
        yield _line("no turn", {column: []}, column)
        for empty in ("", "  \n"):
            yield _line("empty answer", {column: _with(turns, -1, {**turns[-1], content: empty})}, column)
    for name, row in (("response", GOOD["prompt/response"]), ("text", GOOD["text"]), ("output", GOOD["instruction"])):
        for empty in ("", " ", "\n\t", "\u2003"):
            yield _line("empty", {**row, name: empty}, name)
        for half in ("a\ud800b", "\udc00"):
            yield _line("half a surrogate pair", {**row, name: half}, name)
    for nothing in ({}, {"a": 1}, {"": "x"}, {"Text": "x"}, {"prompts": "x", "responses": "y"}):
        yield _line("no kind", nothing)
    yield _line("ids", {"input_ids": [1, 2], "labels": [1, 2]}, "input_ids")


def malformed() -> Iterator[BadLine]:
    """What is no JSON object at all."""
    good = json.dumps(GOOD["prompt/response"]).encode()
    for cut in range(1, len(good)):
        yield BadLine(kind="cut off", raw=good[:cut])
    for raw in (
        good.replace(b'"', b"'"),  # 1 quotes
        good[:-1] + b",}",  # 2 a comma too many
        good.replace(b", ", b" "),  # 3 a comma too few
        good.replace(b": ", b" "),  # 4 no colon
        good + good,  # 5 two objects
        good + b" trailing",  # 6 text after it
        good.replace(b"Me.", b"Me.\t"),  # 7 a raw control character
        b"NaN", b"nul", b"undefined", b"//", b"{'a': 1}", b"{a: 1}", b"{,}", b"{\"a\"}", b"\x00", b"}", b"]",
        b"\xef\xbb\xbf" + good,
        b'{"prompt": "\\x41", "response": "a"}', b'{"prompt": "\\u12", "response": "a"}',
        b'{"text": 01}', b'{"text": .5}', b'{"text": +1}', b'{"text": 1.}',
    ):  # fmt: skip
        yield BadLine(kind="malformed", raw=raw)
    for raw in (b"[1, 2]", b'"text"', b"3", b"null", b"true", b"-1.5e3", b"[]"):
        yield BadLine(kind="no object", raw=raw)
    for raw in (
        '{"text": "café"}'.encode("latin-1"),
        b'{"text": "\xff"}',
        b'{"text": "\xc3"}',
        b"\xfe\xff",
        b'{"text": "\xed\xa0\x80"}',
    ):
        yield BadLine(kind="no UTF-8", raw=raw)
    yield BadLine(kind="bomb", raw=b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}")
    yield BadLine(kind="bomb", raw=b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    yield BadLine(kind="bomb", raw=b'{"text": ' + b"9" * 1_000_000 + b"}")
    yield BadLine(kind="bomb", raw=b'{"text": 1e' + b"9" * 1_000_000 + b"}", key="text")
    yield BadLine(kind="long", raw=b'{"text": "' + b"x" * 5_000_000)


def bad_processed() -> Iterator[BadLine]:
    """Lines that are no row of token ids; the vocabulary has less than 1000."""
    ids, labels = PROCESSED["input_ids"], PROCESSED["labels"]
    for name in ("input_ids", "labels"):
        for wrong in WRONG_LIST:
            yield _line("type", {**PROCESSED, name: wrong}, name)
        for index in range(len(ids)):
            for wrong in (None, True, 1.0, "5", [5], {}):
                yield _line(
                    "element's type", {**PROCESSED, name: _with(PROCESSED[name], index, wrong)}, f"{name}[{index}]"
                )
        yield _line("missing", {key: value for key, value in PROCESSED.items() if key != name}, name)
        yield _line("length", {**PROCESSED, name: [*PROCESSED[name], 7]}, "labels")
    for token in (-1, 1000, 2**31, 2**63, 2**64, 10**25):
        yield _line(
            "no token id",
            {**PROCESSED, "input_ids": _with(ids, 1, token), "labels": _with(labels, 1, token)},
            "input_ids[1]",
        )
    for label in (5, -1, -101, 2**40):
        yield _line("no label", {**PROCESSED, "labels": _with(labels, 1, label)}, "labels[1]")
    for mask in ([1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 2], [1, 1, -1], "111", [1, 1, True]):
        yield _line("mask", {**PROCESSED, "attention_mask": mask}, "attention_mask")
    yield _line("empty", {"input_ids": [], "labels": []}, "input_ids")


def _wrong_types(row: dict[str, Any]) -> Iterator[BadLine]:
    for name, value in row.items():
        for wrong in WRONG_LIST if isinstance(value, list) else WRONG_TEXT:
            if not (name == "input" and wrong is None):  # an absent input is fine
                yield _line("type", {**row, name: wrong}, name)


def _missing(row: dict[str, Any]) -> Iterator[BadLine]:
    for name in row:
        rest = {key: value for key, value in row.items() if key != name}
        if rest and name != "input":
            yield _line("missing", rest, name)


def _misspelt(row: dict[str, Any]) -> Iterator[BadLine]:
    for name in row:
        if name != "input":
            for slip in (name.upper(), name + "s", name[:-1]):
                renamed = {slip if key == name else key: value for key, value in row.items()}
                yield _line("misspelt", renamed, name if len(row) > 1 else "")


def _line(kind: str, row: dict[str, Any], key: str = "") -> BadLine:
    return BadLine(kind=kind, raw=json.dumps(row).encode("ascii"), key=key)


def _with(items: list[Any], index: int, value: Any) -> list[Any]:
    changed = list(items)
    changed[index] = value
    return changed
