"""The row kinds: what a JSON object must hold to be a training row, and what is wrong with it otherwise.

Every kind becomes one of three values: messages (prompt/response, alpaca and ShareGPT rows too), plain text, or token
ids. Kinds may be mixed in a file. ``data.schema`` maps our key to the file's column: ``{"prompt": "question"}``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import attrs

from eulerforge.config.schema import ROW_KEYS
from eulerforge.data.read import BadRows, SourceRow, json_type

# The keys that a kind needs, most telling first; the first kind whose keys are all there wins.
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("messages", ("messages",)),
    ("conversations", ("conversations",)),
    ("prompt/response", ("prompt", "response")),
    ("instruction/output", ("instruction", "output")),
    ("text", ("text",)),
)
_ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
_NO_TOOLS = (
    "tool definitions and calls are not trained: take it out, or render such rows yourself (data.format=processed)"
)
_MEANT_OF_TURNS = {
    **dict.fromkeys(("tool_calls", "function_call", "function_calls", "functions"), _NO_TOOLS),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        "reasoning is trained as a part of the content: put it there as the chat template writes it, or take it out",
    ),
}
"""What a turn may hold beside its role and content, which would be lost without a word, and the way out."""
_MEANT_OF_ROWS = {
    "tools": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "history": "write all turns as messages",
}
_MARKS = ("weight", "train", "training", "loss")
"""With which other tools say of a turn whether it is trained."""
_SYSTEM = "system"
"""The column with a row's own system prompt."""
_NOTHING = ("", "[]", "{}", "null")
IGNORED = -100
_KINDS_KEPT = 256
_UNREAD_SHOWN = 20
_HALF_PAIR = re.compile("[\ud800-\udfff]")


# not frozen, here and below: a frozen one takes three times as long to make, and there are millions
@attrs.define
class Message:
    """One turn: ``role`` is system, user or assistant."""

    role: str
    content: str

    def to_template(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


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


class _Bad(Exception):
    """A row that cannot be used: message, key and hint for BadRows."""

    def __init__(self, message: str, key: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.hint = hint


class RowParser:
    """Turns JSON objects into rows by the preset's schema.

    ``vocabulary`` is the number of token ids, needed for processed rows only.
    """

    def __init__(self, schema: Mapping[str, str], *, processed: bool = False, vocabulary: int = 0) -> None:
        self._columns = {key: schema.get(key, key) for key in ROW_KEYS}
        self._kinds: dict[tuple[str, ...], str | None] = {}
        self._seen: Counter[tuple[str, ...]] = Counter()
        self._extra: Counter[str] = Counter()
        self._processed = processed
        self._vocabulary = vocabulary

    def parse(self, row: SourceRow, bad: BadRows) -> Row | None:
        """The row, or None when it is wrong: then ``bad`` says why."""
        try:
            return self._token_row(row) if self._processed else self._row(row)
        except _Bad as error:
            bad.add(row.where, str(error), key=error.key, hint=error.hint)
            return None

    def with_blank_answer(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The object with a stand-in for the answer that a prompt does not have yet."""
        column = self._columns
        given, kind = dict(data), self._kind_of(data)
        for asked, answer in (("prompt", "response"), ("instruction", "output")):
            # a row that is whole keeps its kind, whatever other columns it has
            if column[asked] in given and kind in (None, f"{asked}/{answer}"):
                given[column[answer]] = "..."
        for turns, role, content, answerer in (
            ("messages", "role", "content", "assistant"),
            ("conversations", "from", "value", "gpt"),
        ):
            listed = given.get(column[turns])
            if not (isinstance(listed, list) and listed and isinstance(listed[-1], dict)):
                continue
            if listed[-1].get(column[role]) not in ("assistant", "gpt", "model"):
                given[column[turns]] = [*listed, {column[role]: answerer, column[content]: "..."}]
        return given

    def _row(self, row: SourceRow) -> Row:
        data = row.data
        names = tuple(data)
        if names not in self._kinds and len(self._kinds) < _KINDS_KEPT:
            self._kinds[names] = self._kind_of(names)
        kind = self._kinds[names] if names in self._kinds else self._kind_of(names)
        if kind is None:
            raise self._no_kind(data)
        if names in self._kinds:
            self._seen[names] += 1
        if kind == "text":
            return TextRow(text=self._string(data, "text"), place=row.place, where=row.where)
        for column, hint in _MEANT_OF_ROWS.items():
            if _says_something(data.get(column)) and column not in self._read_of(kind):
                raise _Bad("would be left out", column, hint)
        separator = "\n\n"
        if kind == "messages":
            messages = self._turns(data, "messages", "role", "content", {role: role for role in _ROLES})
        elif kind == "conversations":
            messages = self._turns(data, "conversations", "from", "value", _SHAREGPT_ROLES)
        elif kind == "prompt/response":
            separator = ""
            messages = (
                Message("user", self._string(data, "prompt", may_be_empty=True)),
                Message("assistant", self._string(data, "response")),
            )
        else:
            instruction = self._string(data, "instruction")
            given = "" if data.get(self._columns["input"]) is None else self._string(data, "input", may_be_empty=True)
            prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
            messages = (Message("user", prompt), Message("assistant", self._string(data, "output")))
        if _says_something(data.get(_SYSTEM)) and _SYSTEM not in self._read_of(kind):
            messages = self._with_system(data[_SYSTEM], messages)
        return ChatRow(messages=messages, separator=separator, kind=kind, place=row.place, where=row.where)

    @staticmethod
    def _with_system(system: Any, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The row's own system prompt in front, as instruction files and conversations have it in a column."""
        if not isinstance(system, str):
            raise _Bad(f"must be a string, not {json_type(system)}", _SYSTEM)
        if messages[0].role == "system":
            raise _Bad("there is a system turn too", _SYSTEM, "take one of them out")
        return (Message("system", system), *messages)

    def unread(self) -> dict[str, int]:
        """Columns and keys of turns that no kind reads, and in how many rows since the last call."""
        found: Counter[str] = Counter()
        for names, rows in self._seen.items():
            kind = self._kinds[names]
            if kind is not None:
                read = self._read_of(kind) | (set() if kind == "text" else {_SYSTEM})
                found.update({name: rows for name in names if name not in read})
        found += self._extra
        self._seen.clear()
        self._extra.clear()
        return dict(found.most_common(_UNREAD_SHOWN))

    def _read_of(self, kind: str) -> set[str]:
        """The columns that rows of a kind have."""
        keys = dict(_KINDS)[kind]
        return {self._columns[key] for key in (*keys, *(("input",) if kind == "instruction/output" else ()))}

    def _kind_of(self, names: Collection[str]) -> str | None:
        return next((kind for kind, keys in _KINDS if all(self._columns[key] in names for key in keys)), None)

    def _string(self, data: Mapping[str, Any], key: str, *, prefix: str = "", may_be_empty: bool = False) -> str:
        column = self._columns[key]
        value = data[column]
        if not isinstance(value, str):
            raise _Bad(f"must be a string, not {json_type(value)}", prefix + column)
        if not may_be_empty and not value.strip():
            raise _Bad("is empty", prefix + column, "delete the row, or give it text to learn")
        if not value.isascii() and _HALF_PAIR.search(value):
            raise _Bad("holds half of a surrogate pair, which is no text", prefix + column, r"look for a lone \ud8..")
        return value

    def _turns(
        self, data: Mapping[str, Any], key: str, role_key: str, content_key: str, roles: Mapping[str, str]
    ) -> tuple[Message, ...]:
        column = self._columns[key]
        turns = data[column]
        if not isinstance(turns, list):
            raise _Bad(f"must be an array of turns, not {json_type(turns)}", column)
        messages = []
        extra: set[str] = set()
        for index, turn in enumerate(turns):
            place = f"{column}[{index}]"
            if not isinstance(turn, dict):
                raise _Bad(f"must be an object, not {json_type(turn)}", place)
            for needed in (self._columns[role_key], self._columns[content_key]):
                if needed not in turn:
                    raise _Bad(f"{needed} is missing", f"{place}.{needed}", f"it has {_names(turn)}")
            role = self._string(turn, role_key, prefix=f"{place}.", may_be_empty=True)
            if role not in roles:
                raise _Bad(f"unknown role {role!r}", f"{place}.{self._columns[role_key]}", f"known: {', '.join(roles)}")
            role = roles[role]
            if len(turn) > 2:
                self._refuse_meant(turn, place, role)
                more = turn.keys() - {self._columns[role_key], self._columns[content_key], *_MARKS, *_MEANT_OF_TURNS}
                extra.update(f"{column}[].{name}" for name in more)
            content = self._string(turn, content_key, prefix=f"{place}.", may_be_empty=role != "assistant")
            messages.append(Message(role, content))
        self._extra.update(extra)
        if all(message.role != "assistant" for message in messages):
            raise _Bad(
                "there is no assistant turn, so nothing to learn", column, "delete the row, or give it an answer"
            )
        return tuple(messages)

    def _refuse_meant(self, turn: Mapping[str, Any], place: str, role: str) -> None:
        """Raise for what the turn's author meant to matter, and what would be lost."""
        for name, hint in _MEANT_OF_TURNS.items():
            if _says_something(turn.get(name)):
                raise _Bad("would be left out", f"{place}.{name}", hint)
        for name in _MARKS if role == "assistant" else ():
            if turn.get(name) not in (None, 1):
                raise _Bad(
                    "says that this answer is not trained, or by another weight; every answer is, by the same",
                    f"{place}.{name}",
                    "leave the turns before the answers out, or give token ids with labels (data.format=processed)",
                )

    def _no_kind(self, data: Mapping[str, Any]) -> _Bad:
        """The most helpful thing to say of an object that is no row: the missing half, else all kinds."""
        for _, keys in _KINDS:
            missing = [self._columns[key] for key in keys if self._columns[key] not in data]
            if len(missing) < len(keys):
                ours = next(key for key in keys if self._columns[key] == missing[0])
                others = [name for name in data if name not in {self._columns[key] for key in keys}]
                hint = f"map the file's column: --set data.schema.{ours}=COLUMN" + (
                    f" (this row also has {_names(others)})" if others else ""
                )
                return _Bad("is missing", missing[0], hint)
        if self._columns["input_ids"] in data:
            return _Bad("the row holds token ids", self._columns["input_ids"], "--set data.format=processed")
        return _Bad(
            f"no known row kind; it has {_names(data) or 'no keys'}",
            hint="rows are {prompt, response}, {text}, {messages}, {instruction, input, output} or {conversations}; "
            "map other names, such as --set data.schema.prompt=question",
        )

    def _token_row(self, row: SourceRow) -> ProcessedRow:
        ids = self._integers(row.data, "input_ids")
        labels = self._integers(row.data, "labels")
        ids_column, column = self._columns["input_ids"], self._columns["labels"]
        if not ids:
            raise _Bad("is empty", ids_column)
        if len(labels) != len(ids):
            raise _Bad(f"has {len(labels)} values, {ids_column} has {len(ids)}", column, "they go pair by pair")
        for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if not 0 <= token < self._vocabulary:
                raise _Bad(f"{token} is no token id: 0 to {self._vocabulary - 1}", f"{ids_column}[{index}]")
            if label not in (IGNORED, token):
                raise _Bad(
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
            raise _Bad("is missing", column, "data.format=processed takes rows {input_ids, labels}")
        values = data[column]
        if not isinstance(values, list):
            raise _Bad(f"must be an array of integers, not {json_type(values)}", column)
        for index, value in enumerate(values):
            if type(value) is not int:
                raise _Bad(f"must be an integer, not {json_type(value)}", f"{column}[{index}]")
        return values

    def _kept(self, data: Mapping[str, Any], length: int) -> int:
        """How many tokens are real: an attention mask may only cut padding off the end."""
        column = self._columns["attention_mask"]
        if data.get(column) is None:
            return length
        mask = self._integers(data, "attention_mask")
        kept = sum(1 for value in mask if value == 1)
        if len(mask) != length:
            raise _Bad(f"has {len(mask)} values for {length} tokens", column)
        if mask != [1] * kept + [0] * (length - kept) or not kept:
            raise _Bad("must be ones, then zeros for padding at the end", column)
        return kept


def _says_something(value: Any) -> bool:
    """Whether a column holds more than an empty value, or the text of one."""
    return bool(value) and not (isinstance(value, str) and value.strip() in _NOTHING)


def _names(names: Any) -> str:
    return ", ".join(str(name) for name in list(names)[:8])
