"""A conversation as the tokenizer's chat template writes it, with the spans of its answers.

Notable: spans are found by rendering the turns before each answer with the generation prompt, which must be a prefix of
the whole. A template for which that is not so would be trained on one prompt and asked another: an error.
A span ends with the token that ends the turn; the line break that many templates put after it is not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime, time
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from eulerforge.data.turns import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TEMPLATE_HINT = "--set data.template=none trains on plain text"
PUT_BEFORE = "delete that turn, or put a user turn before it"
_PROBE = (Message("user", "question"), Message("assistant", "answer"))


class ChatTemplate:
    """The template of a tokenizer, whose special tokens are ``closers``; one that asks the day is told ``day``.

    ``asks_the_day`` says that it does, so that rows of another day are other rows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, closers: tuple[str, ...], day: date) -> None:
        self._tokenizer, self._closers = tokenizer, closers
        self._eos = tokenizer.eos_token or ""
        self.source = str(tokenizer.chat_template)
        self.asks_the_day = "strftime_now" in self.source
        self._told = _clock(day) + tokenizer.get_chat_template() if self.asks_the_day else None
        self._end_marker = self._probe_end_marker()

    def apply(self, messages: Sequence[Message], *, generate: bool = False) -> str:
        """The text of the turns, with ``generate`` up to where the next answer begins."""
        turns = [message.to_template() for message in messages]
        return str(
            self._tokenizer.apply_chat_template(
                turns, chat_template=self._told, tokenize=False, add_generation_prompt=generate
            )
        )

    def render(self, messages: Sequence[Message]) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The text of a conversation, closed, and the spans of its answers that are trained.

        Raises:
            NotAPrefixError: the last answer is not what its prompt asks for; others are left out.
            Exception: whatever the template raises.
        """
        try:
            return self._spans(messages)
        except NotAPrefixError:
            # of a conversation that ends with a question no template shows the last answer as one that it asks for
            answered = _until_last_answer(messages)
            if len(answered) == len(messages):
                raise
            return self._spans(answered)

    def _spans(self, messages: Sequence[Message]) -> tuple[str, tuple[tuple[int, int], ...]]:
        text = self.apply(messages)
        last = len(messages) - 1
        last_answer = len(_until_last_answer(messages)) - 1
        spans = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._asked(messages[:index])
            if prompt is None or not text.startswith(prompt):
                if index < last_answer:
                    # nothing asks for it, or it is shown otherwise once more turns follow, as reasoning is
                    continue
                if prompt is None:
                    raise NotAPrefixError("no turn before the row's answer asks for it", PUT_BEFORE)
                raise NotAPrefixError(
                    f"the chat template renders turn {index + 1} differently from the prompt that asks for it: "
                    f"{_fork(prompt, text)}"
                )
            end = self._end_of_turn(text, len(prompt), text if index == last else self.apply(messages[: index + 1]))
            if end <= len(prompt):
                raise NotAPrefixError(f"the chat template leaves nothing of turn {index + 1} to learn")
            spans.append((len(prompt), end))
        # A template that ends the last answer with no token of its own would never teach the model to stop.
        if messages[last].role == "assistant" and not text[: spans[-1][1]].endswith(self._closers) and self._eos:
            text = text[: spans[-1][1]] + self._eos
            spans[-1] = (spans[-1][0], len(text))
        return text, tuple(spans)

    def _asked(self, before: Sequence[Message]) -> str | None:
        """The prompt of the answer behind these turns; None where the template has none for want of a question."""
        if any(message.role == "user" for message in before):
            return self.apply(before, generate=True)
        try:
            return self.apply(before, generate=True) if before else None
        except TemplateError:
            return None

    def _end_of_turn(self, text: str, start: int, until_here: str) -> int:
        """Where the answer that begins at ``start`` ends, its closing token included."""
        if text.startswith(until_here):
            trimmed = until_here.rstrip()
            return len(trimmed) if trimmed.endswith(self._closers) else len(until_here)
        # Some templates show an answer otherwise once it is no longer the last (reasoning is left out): then the
        # template's own closing token says where it ends.
        found = text.find(self._end_marker, start) if self._end_marker else -1
        if found < 0:
            raise NotAPrefixError("the chat template changes an answer when more turns follow, and does not close it")
        return found + len(self._end_marker)

    def _probe_end_marker(self) -> str:
        try:
            text = self.apply(_PROBE).rstrip()
        except (TemplateError, TypeError, ValueError, KeyError):
            return ""  # A template of its own kind; its rows say what is wrong.
        return max((token for token in self._closers if text.endswith(token)), key=len, default="")


def _until_last_answer(messages: Sequence[Message]) -> Sequence[Message]:
    """The turns up to the last answer; none where there is no answer."""
    return messages[: max((at + 1 for at, one in enumerate(messages) if one.role == "assistant"), default=0)]


def _clock(day: date) -> str:
    """A macro ``strftime_now`` that hides transformers' own, which takes no clock: it tells 0:00 of ``day``."""
    midnight = datetime.combine(day, time())
    letters = [*"aAwdbBmyYHIpMSfzZjUWcxXGuV", *(f"-{letter}" for letter in "dmHIMSj")]
    told = {f"%{letter}": midnight.strftime(f"%{letter}") for letter in letters}
    replaced = "".join(f" | replace({was!r}, {now!r})" for was, now in told.items())
    return "{% macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro +%}"


class NotAPrefixError(Exception):
    """The template breaks the rule that a prompt is a prefix of its training row, or the row has no prompt."""

    def __init__(self, message: str, hint: str = NO_TEMPLATE_HINT) -> None:
        super().__init__(message)
        self.hint = hint


def _fork(prompt: str, text: str) -> str:
    """Where two texts part: a few characters of each."""
    at = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))
    low = max(0, at - 10)
    return f"{prompt[low : at + 20]!r} in the prompt, {text[low : at + 20]!r} in the row"
