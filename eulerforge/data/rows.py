"""Rows: what a JSON object must hold to be a training row, and what is wrong with it otherwise.

Every kind becomes one of three values: messages (prompt/response, alpaca and ShareGPT rows too), plain text, or token
ids. Kinds may be mixed in a file. ``data.schema`` maps our key to the file's column: ``{"prompt": "question"}``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import attrs

from eulerforge.config.schema import ROW_KEYS
from eulerforge.data.kinds import columns_of, kind_of, no_kind
from eulerforge.data.read import BadRows, SourceRow, json_type
from eulerforge.data.turns import (
    MESSAGES,
    NO_TOOLS,
    SHAREGPT,
    BadRow,
    Message,
    TurnReader,
    says_something,
    text_of,
)

_DIALECTS = {"messages": MESSAGES, "conversations": SHAREGPT}
_PAIRS = {"prompt/response": "response", "prompt/completion": "completion"}
_MEANT_OF_ROWS = {
    "tools": NO_TOOLS,
    "functions": NO_TOOLS,
    "history": "write all turns as messages",
}
_ALL_ANSWERS = "write the turns as messages, where every answer is trained"
IGNORED = -100
_KINDS_KEPT = 256
_UNREAD_SHOWN = 20


# not frozen, here and below: a frozen one takes three times as long to make, and there are millions
@attrs.define(kw_only=True)
class ChatRow:
    """Turns of which the assistant's are trained. ``separator`` stands between turns where no template is used."""

    messages: tuple[Message, ...]
    separator: str
    kind: str
    place: int
    where: str


@attrs.define(kw_only=True)
class TextRow:
    """Text that is trained from its first to its last token."""

    text: str
    kind: str = "text"
    place: int
    where: str


@attrs.frozen(kw_only=True)
class ProcessedRow:
    """A row that comes as token ids; ``labelled`` says which of them are trained."""

    input_ids: tuple[int, ...]
    labelled: tuple[bool, ...]
    kind: str = "processed"
    place: int
    where: str


Row = ChatRow | TextRow | ProcessedRow


class RowParser:
    """Turns JSON objects into rows by the preset's schema.

    ``vocabulary`` is the number of token ids, needed for processed rows only.
    """

    def __init__(self, schema: Mapping[str, str], *, processed: bool = False, vocabulary: int = 0) -> None:
        self._columns = {key: schema.get(key, key) for key in ROW_KEYS}
        self._kinds: dict[tuple[str, ...], str | None] = {}
        self._seen: Counter[tuple[str, ...]] = Counter()
        self._turns = TurnReader(self._columns)
        self._processed = processed
        self._vocabulary = vocabulary

    def parse(self, row: SourceRow, bad: BadRows) -> Row | None:
        """The row, or None when it is wrong: then ``bad`` says why."""
        try:
            return self._token_row(row) if self._processed else self._row(row)
        except BadRow as error:
            bad.add(row.where, str(error), key=error.key, hint=error.hint)
            return None

    def with_blank_answer(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The object with a stand-in for the answer that a prompt does not have yet."""
        column = self._columns
        given, kind = dict(data), kind_of(data, self._columns)
        for asked, answer in (*(("prompt", answer) for answer in _PAIRS.values()), ("instruction", "output")):
            # a row that is whole keeps its kind, whatever other columns it has
            if column[asked] in given and kind in (None, f"{asked}/{answer}"):
                turn = {column["role"]: "assistant", column["content"]: "..."}
                given[column[answer]] = [turn] if isinstance(given[column[asked]], list) else "..."
        for turns, dialect in _DIALECTS.items():
            listed = given.get(column[turns])
            if not (isinstance(listed, list) and listed and isinstance(listed[-1], dict)):
                continue
            role, content = self._turns.keys_of(listed, dialect)
            if dialect[2].get(str(listed[-1].get(role)).lower()) != "assistant":
                given[column[turns]] = [*listed, {role: "assistant", content: "..."}]
        return given

    def _row(self, row: SourceRow) -> Row:
        data = row.data
        names = tuple(data)
        if names not in self._kinds and len(self._kinds) < _KINDS_KEPT:
            self._kinds[names] = kind_of(names, self._columns)
        kind = self._kinds[names] if names in self._kinds else kind_of(names, self._columns)
        if kind is None:
            raise no_kind(data, self._columns)
        if names in self._kinds:
            self._seen[names] += 1
        if kind == "text":
            return TextRow(text=self._string(data, "text"), place=row.place, where=row.where)
        system = self._columns["system"]
        for column, hint in _MEANT_OF_ROWS.items():
            if says_something(data.get(column)) and column != system and column not in columns_of(kind, self._columns):
                raise BadRow("would be left out", column, hint)
        separator, named = "\n\n", kind
        if kind in _DIALECTS:
            messages = self._turns.read(data[self._columns[kind]], self._columns[kind], _DIALECTS[kind])
        elif (answer := _PAIRS.get(kind)) is not None:
            behind = self._columns[answer]
            if isinstance(data[behind], list) and isinstance(data[self._columns["prompt"]], list):
                named, messages = "messages", self._pair_of_turns(data, behind)
            else:
                separator = ""
                messages = (
                    Message("user", self._string(data, "prompt", may_be_empty=True)),
                    Message("assistant", text_of(data[behind], behind)),
                )
        else:
            instruction = self._string(data, "instruction")
            mapped = self._columns["input"] == self._columns["instruction"]  # a column says its text once
            none = mapped or data.get(self._columns["input"]) is None
            given = "" if none else self._string(data, "input", may_be_empty=True)
            prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
            messages = (Message("user", prompt), Message("assistant", self._string(data, "output")))
        if says_something(data.get(system)) and system not in columns_of(kind, self._columns):
            messages = _with_system(data[system], messages, system)
        return ChatRow(messages=messages, separator=separator, kind=named, place=row.place, where=row.where)

    def _pair_of_turns(self, data: Mapping[str, Any], answer: str) -> tuple[Message, ...]:
        """A prompt and a completion of turns, as TRL has them: the prompt is not trained, whoever speaks in it."""
        asked = self._columns["prompt"]
        before = self._turns.read(data[asked], asked, MESSAGES, answered=False)
        behind = self._turns.read(data[answer], answer, MESSAGES)
        if any(message.role == "assistant" for message in before):
            raise BadRow("holds an answer, which is not to be trained here", asked, _ALL_ANSWERS)
        if len(behind) > 1:
            raise BadRow(f"must be one turn, the answer, not {len(behind)}", answer, _ALL_ANSWERS)
        return before + behind

    def unread(self) -> dict[str, int]:
        """Columns and keys of turns that no kind reads, and in how many rows since the last call."""
        found: Counter[str] = Counter()
        for names, rows in self._seen.items():
            kind = self._kinds[names]
            if kind is not None:
                read = columns_of(kind, self._columns) | (set() if kind == "text" else {self._columns["system"]})
                found.update({name: rows for name in names if name not in read})
        found += self._turns.extra
        self._seen.clear()
        self._turns.extra.clear()
        return dict(found.most_common(_UNREAD_SHOWN))

    def _string(self, data: Mapping[str, Any], key: str, *, may_be_empty: bool = False) -> str:
        column = self._columns[key]
        return text_of(data[column], column, may_be_empty=may_be_empty)

    def _token_row(self, row: SourceRow) -> ProcessedRow:
        ids = self._integers(row.data, "input_ids")
        labels = self._integers(row.data, "labels")
        ids_column, column = self._columns["input_ids"], self._columns["labels"]
        if not ids:
            raise BadRow("is empty", ids_column)
        if len(labels) != len(ids):
            raise BadRow(f"has {len(labels)} values, {ids_column} has {len(ids)}", column, "they go pair by pair")
        for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if not 0 <= token < self._vocabulary:
                raise BadRow(f"{token} is no token id: 0 to {self._vocabulary - 1}", f"{ids_column}[{index}]")
            if label not in (IGNORED, token):
                raise BadRow(
                    f"{label} is neither {IGNORED} (not trained) nor the token at its place, {token}",
                    f"{column}[{index}]",
                    "labels stand at their own token; the shift by one is made by the loss",
                )
        kept = self._kept(row.data, len(ids))
        labelled = tuple(label != IGNORED for label in labels[:kept])
        return ProcessedRow(input_ids=tuple(ids[:kept]), labelled=labelled, place=row.place, where=row.where)

    def _integers(self, data: Mapping[str, Any], key: str) -> list[int]:
        column = self._columns[key]
        if column not in data:
            raise BadRow("is missing", column, "data.format=processed takes rows {input_ids, labels}")
        values = data[column]
        if not isinstance(values, list):
            raise BadRow(f"must be an array of integers, not {json_type(values)}", column)
        for index, value in enumerate(values):
            if type(value) is not int:
                raise BadRow(f"must be an integer, not {json_type(value)}", f"{column}[{index}]")
        return values

    def _kept(self, data: Mapping[str, Any], length: int) -> int:
        """How many tokens are real: an attention mask may only cut padding off the end."""
        column = self._columns["attention_mask"]
        if data.get(column) is None:
            return length
        mask = self._integers(data, "attention_mask")
        kept = sum(1 for value in mask if value == 1)
        if len(mask) != length:
            raise BadRow(f"has {len(mask)} values for {length} tokens", column)
        if mask != [1] * kept + [0] * (length - kept) or not kept:
            raise BadRow("must be ones, then zeros for padding at the end", column)
        return kept


def _with_system(system: Any, messages: tuple[Message, ...], column: str) -> tuple[Message, ...]:
    """The row's own system prompt in front, as instruction files and conversations have it in a column."""
    if messages[0].role == "system":
        raise BadRow("there is a system turn too", column, "take one of them out")
    return (Message("system", text_of(system, column)), *messages)
