"""A row as the text that the model sees, with the spans of it that are trained.

The rules: the tokenizer's own chat template speaks where there is one (``data.template``), else turns are joined as
plain text and each answer is closed by the EOS token; a span runs from where generation would start to the token that
ends the turn, that token included.
An answer with no turn before it has no prompt: it is not trained where later ones are (``untrained`` counts it).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING

import attrs
from jinja2 import TemplateError

from eulerforge.data.chat_template import NO_TEMPLATE_HINT, PUT_BEFORE, ChatTemplate, NotAPrefixError
from eulerforge.data.read import BadRows
from eulerforge.data.rows import ChatRow, Row, TextRow
from eulerforge.data.template_shape import TemplateShape, cues_of, has_markup, is_plain, learn_shape
from eulerforge.data.turns import Message
from eulerforge.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from eulerforge.config.schema import DataConfig

_SHAPE_TURNS = 5
WHOLE = -1
"""The shape of a row that is trained from begin to end."""
ANSWER_LAST = -2
"""The shape of a row of plain text whose one answer is the rest of it."""


@attrs.define
class Rendered:
    """Text with the half-open character spans of it that are trained, in order and apart.

    ``stray`` says that a message holds the text of a special token, which its template did not put there.
    ``shape`` is a number that rows share which differ in their contents only, 0 for a row of its own kind.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    where: str
    stray: bool = False
    shape: int = attrs.field(default=0, eq=False)


class Renderer:
    """Renders rows by the preset's template choice. Raises DataError when the choice cannot be met.

    ``plain_for_want`` says that plain text is what is left without a template, not what was asked for.
    ``writes_the_day`` says that the template asks for the date, so that rows of another day are other rows; ``day`` is
    what it is told, ``data.date`` or today.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._system = (Message("system", config.system_prompt),) if config.system_prompt else ()
        has_template = bool(tokenizer.chat_template)
        if config.template == "chat" and not has_template:
            raise DataError(
                "the tokenizer has no chat template", key="data.template", hint="--set data.template=auto or none"
            )
        self.uses_template = has_template and config.template != "none"
        self.plain_for_want = not has_template and config.template == "auto"
        self.day = date.fromisoformat(config.date) if config.date else today()
        self._eos = tokenizer.eos_token or ""
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        closers = tuple(special | {token for token in tokenizer.all_special_tokens if token})
        self._special_text = re.compile("|".join(map(re.escape, closers)) or r"(?!)")
        self._special_is_markup = all(map(has_markup, closers))
        self._template = ChatTemplate(tokenizer, closers, self.day) if self.uses_template else None
        self.writes_the_day = self._template is not None and self._template.asks_the_day
        self._cues = cues_of(self._template.source if self._template else "")
        self._shapes: dict[tuple[str, ...], tuple[int, TemplateShape] | None] = {}

    def render_all(self, rows: Sequence[ChatRow | TextRow], bad: BadRows) -> list[Rendered | None]:
        """Every row's text and spans, None for a row that ``bad`` now names.

        Rows of a known shape are joined; the first and the last such row of the call are rendered too, and should they
        differ, all of its rows and all later ones are rendered.
        """
        joined = [self._joined_by_shape(row) for row in rows]
        by_shape = [index for index, one in enumerate(joined) if one is not None]
        for index in {*by_shape[:1], *by_shape[-1:]}:
            if joined[index] != self.render(rows[index], BadRows()):
                self._shapes = dict.fromkeys(self._shapes)
                joined = [None] * len(rows)
                break
        return [one or self.render(row, bad) for row, one in zip(rows, joined, strict=True)]

    def _joined_by_shape(self, row: ChatRow | TextRow) -> Rendered | None:
        if isinstance(row, TextRow) or self._template is None:
            return None
        messages = self._with_system(row.messages)
        roles = tuple([message.role for message in messages])
        if roles not in self._shapes:
            # a conversation of a rare shape is not worth the probes
            learnt = learn_shape(roles, self._template.render) if len(roles) <= _SHAPE_TURNS else None
            self._shapes[roles] = (len(self._shapes) + 1, learnt) if learnt is not None else None
        known = self._shapes[roles]
        if known is None or not is_plain(messages, self._cues):
            return None
        number, shape = known
        text, spans = shape.fill(messages)
        # without markup there is no special token either, where each of them has some
        stray = not self._special_is_markup and self.holds_special(row.messages)
        return Rendered(text, spans, row.where, stray, 0 if stray else number)

    def render(self, row: ChatRow | TextRow, bad: BadRows) -> Rendered | None:
        """The row's text and spans, or None when the template cannot render it: then ``bad`` says why."""
        if isinstance(row, TextRow):
            text = self._closed(row.text)
            return Rendered(text=text, spans=((0, len(text)),), where=row.where, shape=WHOLE)
        messages = self._with_system(row.messages)
        if self._template is None:
            text, spans = self._joined(messages, row.separator)
            shape = ANSWER_LAST if len(spans) == 1 and spans[0][1] == len(text) else 0
            return Rendered(text=text, spans=spans, where=row.where, shape=shape)
        try:
            text, spans = self._template.render(messages)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            hint = NO_TEMPLATE_HINT
            if self._system and "system" in str(error).lower():
                hint = f"this template takes no data.system_prompt; or {hint}"
            elif _begins_with_answer(row.messages):
                hint = f"the row begins with an answer: {PUT_BEFORE}; or {hint}"
            bad.add(row.where, f"the chat template refuses this row: {error}", key="data.template", hint=hint)
            return None
        except NotAPrefixError as error:
            bad.add(row.where, str(error), key="data.template", hint=error.hint)
            return None
        return Rendered(text=text, spans=spans, where=row.where, stray=self.holds_special(row.messages))

    def prompt(self, messages: Sequence[Message], separator: str) -> Rendered:
        """The text from which the next answer is generated, with the spans of the answers that it holds already."""
        turns = self._with_system(messages)
        if self._template is None:
            text, spans = self._joined((*turns, Message("assistant", "")), separator, close_last=False)
            return Rendered(text, spans[:-1], "prompt")
        text = self._template.apply(turns, generate=True)
        given: tuple[tuple[int, int], ...] = ()
        if any(message.role == "assistant" for message in turns):
            try:
                known, spans = self._template.render(turns)
                given = tuple(span for span in spans if text.startswith(known[: span[1]]))
            except NotAPrefixError:
                pass  # such a row is not trained on
        return Rendered(text, given, "prompt")

    def holds_special(self, messages: Sequence[Message]) -> bool:
        """Whether a message holds the text of a special token."""
        return any(self._special_text.search(message.content) for message in messages)

    def _with_system(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """data.system_prompt in front, unless the row brings its own."""
        if self._system and not (messages and messages[0].role == "system"):
            return (*self._system, *messages)
        return tuple(messages)

    def _joined(
        self, messages: Sequence[Message], separator: str, *, close_last: bool = True
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        text = ""
        spans = []
        for index, message in enumerate(messages):
            if index:
                text += "\n\n" if messages[index - 1].role == "system" else separator
            start = len(text)
            answer = message.role == "assistant"
            close = answer and (close_last or index < len(messages) - 1)
            text += self._closed(message.content) if close else message.content
            if answer:
                spans.append((start, len(text)))
        return text, tuple(spans)

    def _closed(self, text: str) -> str:
        return text if self._eos and text.endswith(self._eos) else text + self._eos


def _begins_with_answer(messages: Sequence[Message]) -> bool:
    return next((one.role for one in messages if one.role != "system"), "") == "assistant"


def untrained(row: Row, rendered: Rendered) -> bool:
    """Whether an answer of the row is not trained: it has no prompt, or is shown otherwise than it is asked for."""
    return isinstance(row, ChatRow) and len(rendered.spans) < sum(one.role == "assistant" for one in row.messages)


def today() -> date:
    """The day that a template is told where ``data.date`` names none."""
    return date.today()


def dated(config: DataConfig, tokenizer: PreTrainedTokenizerBase, began: str | None) -> DataConfig:
    """With ``data.date`` where the template writes it: as given, else the day ``began``, else today."""
    if config.date or config.format == "processed" or not Renderer(config, tokenizer).writes_the_day:
        return config
    return attrs.evolve(config, date=began or str(today()))
