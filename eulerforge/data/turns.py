"""The turns of a conversation: who speaks, what is said, and what a turn may not hold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import attrs

from eulerforge.data.read import json_type

MESSAGES = (
    "role", "content",
    {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"},
)  # fmt: skip
"""Our keys for a turn's speaker and for what it says, and what each speaker is to us, in whatever case it is written.

``developer`` is OpenAI's newer name for the system: gpt-oss's template writes both alike, most others know it not."""
SHAREGPT = (
    "from", "value",
    {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
     "system": "system", "developer": "system"},
)  # fmt: skip
Dialect = tuple[str, str, Mapping[str, str]]
NO_TOOLS = (
    "tool definitions and calls are not trained: take it out, or render such rows yourself (data.format=processed)"
)
_MEANT = {
    **dict.fromkeys(("tool_calls", "function_call", "function_calls", "functions"), NO_TOOLS),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        "reasoning is trained as a part of the content: put it there as the chat template writes it, or take it out",
    ),
}
"""What a turn may hold beside its role and content, which would be lost without a word, and the way out."""
_MARKS = ("weight", "train", "training", "loss")
"""With which other tools say of a turn whether it is trained."""
_NOTHING = ("", "[]", "{}", "null")
_HALF_PAIR = re.compile("[\ud800-\udfff]")


class BadRow(Exception):
    """A row that cannot be used: message, key and hint for BadRows."""

    def __init__(self, message: str, key: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.hint = hint


# not frozen: a frozen one takes three times as long to make, and there are millions
@attrs.define
class Message:
    """One turn: ``role`` is system, user or assistant."""

    role: str
    content: str

    def to_template(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


class TurnReader:
    """Reads arrays of turns; ``columns`` are the file's names of our keys.

    ``extra`` counts the conversations that have a key which is not read.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._columns = columns
        self.extra: Counter[str] = Counter()

    def read(self, turns: Any, column: str, dialect: Dialect, *, answered: bool = True) -> tuple[Message, ...]:
        """The turns that stand in a column of a row; with ``answered`` one of them at least is an answer.

        Raises:
            BadRow: it names the turn and its key.
        """
        if not isinstance(turns, list):
            raise BadRow(f"must be an array of turns, not {json_type(turns)}", column)
        role_key, content_key = self.keys_of(turns, dialect)
        roles = dialect[2]
        messages = []
        extra: set[str] = set()
        for index, turn in enumerate(turns):
            place = f"{column}[{index}]"
            if not isinstance(turn, dict):
                raise BadRow(f"must be an object, not {json_type(turn)}", place)
            for needed in (role_key, content_key):
                if needed not in turn:
                    raise BadRow(f"{needed} is missing", f"{place}.{needed}", f"it has {names_of(turn)}")
            speaker = text_of(turn[role_key], f"{place}.{role_key}", may_be_empty=True)
            role = roles.get(speaker.lower())
            if role is None:
                raise BadRow(f"unknown role {speaker!r}", f"{place}.{role_key}", f"known: {', '.join(roles)}")
            if len(turn) > 2:
                _refuse_meant(turn, place, role)
                more = turn.keys() - {role_key, content_key, *_MARKS, *_MEANT}
                extra.update(f"{column}[].{name}" for name in more)
            content = turn[content_key]
            if isinstance(content, list) and content and isinstance(content[0], dict):
                content, more = _joined(content, f"{place}.{content_key}")
                extra.update(f"{column}[].{content_key}[].{name}" for name in more)
            content = text_of(content, f"{place}.{content_key}", may_be_empty=role != "assistant")
            messages.append(Message(role, content))
        self.extra.update(extra)
        if answered and all(message.role != "assistant" for message in messages):
            raise BadRow(
                "there is no assistant turn, so nothing to learn", column, "delete the row, or give it an answer"
            )
        return tuple(messages)

    def keys_of(self, turns: list[Any], dialect: Dialect) -> tuple[str, str]:
        """The file's names of a turn's speaker and of what it says.

        A column of ShareGPT's may hold OpenAI's turns, as Unsloth's files do: the first turn tells.
        """
        keys = self._columns[dialect[0]], self._columns[dialect[1]]
        first = turns[0] if turns and isinstance(turns[0], dict) else {}
        others = self._columns[MESSAGES[0]], self._columns[MESSAGES[1]]
        return others if keys[0] not in first and all(key in first for key in others) else keys


def _joined(parts: list[Any], place: str) -> tuple[str, set[str]]:
    """A content in parts, OpenAI's other form, as chat templates write it, one text behind another; and keys unread."""
    texts: list[str] = []
    extra: set[str] = set()
    for index, part in enumerate(parts):
        if not isinstance(part, dict):
            raise BadRow(f"must be an object, not {json_type(part)}", f"{place}[{index}]")
        if part.get("type") != "text":
            raise BadRow(
                f"a part of type {part.get('type')!r} is not trained, text alone is",
                f"{place}[{index}].type",
                "take the part out, or delete the row",
            )
        texts.append(text_of(part.get("text"), f"{place}[{index}].text", may_be_empty=True))
        extra.update(name for name, value in part.items() if name not in ("type", "text") and says_something(value))
    return "".join(texts), extra


def _refuse_meant(turn: Mapping[str, Any], place: str, role: str) -> None:
    """Raise for what the turn's author meant to matter, and what would be lost."""
    for name, hint in _MEANT.items():
        if says_something(turn.get(name)):
            raise BadRow("would be left out", f"{place}.{name}", hint)
    for name in _MARKS if role == "assistant" else ():
        if turn.get(name) not in (None, 1):
            raise BadRow(
                "says that this answer is not trained, or by another weight; every answer is, by the same",
                f"{place}.{name}",
                "leave the turns before the answers out, or give token ids with labels (data.format=processed)",
            )


def text_of(value: Any, key: str, *, may_be_empty: bool = False) -> str:
    """The text that a row's key holds.

    Raises:
        BadRow: it is none, or there is nothing in it.
    """
    if not isinstance(value, str):
        raise BadRow(f"must be a string, not {json_type(value)}", key)
    if not may_be_empty and not value.strip():
        raise BadRow("is empty", key, "delete the row, or give it text to learn")
    if not value.isascii() and _HALF_PAIR.search(value):
        raise BadRow("holds half of a surrogate pair, which is no text", key, r"look for a lone \ud8..")
    return value


def says_something(value: Any) -> bool:
    """Whether a column holds more than an empty value, or the text of one."""
    return bool(value) and not (isinstance(value, str) and value.strip() in _NOTHING)


def names_of(names: Any) -> str:
    return ", ".join(str(name) for name in list(names)[:8])
