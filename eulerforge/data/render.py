"""A row as the text that the model sees, with the spans of it that are trained.

The rules: the tokenizer's own chat template speaks where there is one (``data.template``), else turns are joined as
plain text and each answer is closed by the EOS token; a span runs from where generation would start to the token that
ends the turn, that token included; the line break that many templates put after it is not trained.
Notable: spans are found by rendering the turns before each answer with the generation prompt, which must be a prefix of
the whole. A template for which that is not so would be trained on one prompt and asked another: an error.
An answer with no turn before it has no prompt: it is not trained where later ones are (``untrained`` counts it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from typing import TYPE_CHECKING, Any

import attrs
from jinja2 import TemplateError

from eulerforge.data.read import BadRows, SourceRow
from eulerforge.data.rows import ChatRow, ProcessedRow, Row, RowParser, TextRow
from eulerforge.data.template_shape import TemplateShape, cues_of, has_markup, is_plain, learn_shape
from eulerforge.data.turns import Message
from eulerforge.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from eulerforge.config.schema import DataConfig

_PROBE = (Message("user", "question"), Message("assistant", "answer"))
_SHAPE_TURNS = 5
WHOLE = -1
"""The shape of a row that is trained from begin to end."""
ANSWER_LAST = -2
"""The shape of a row of plain text whose one answer is the rest of it."""
_NO_TEMPLATE_HINT = "--set data.template=none trains on plain text"
_PUT_BEFORE = "delete that turn, or put a user turn before it"


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
        self.writes_the_day = self.uses_template and "strftime_now" in str(tokenizer.chat_template)
        self.day = date.fromisoformat(config.date) if config.date else today()
        self._template = _clock(self.day) + tokenizer.get_chat_template() if self.writes_the_day else None
        self._eos = tokenizer.eos_token or ""
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._closers = tuple(special | {token for token in tokenizer.all_special_tokens if token})
        self._special_text = re.compile("|".join(map(re.escape, self._closers)) or r"(?!)")
        self._special_is_markup = all(map(has_markup, self._closers))
        self._end_marker = self._probe_end_marker() if self.uses_template else ""
        self._cues = cues_of(str(tokenizer.chat_template) if self.uses_template else "")
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
        if isinstance(row, TextRow) or not self.uses_template:
            return None
        messages = self._with_system(row.messages)
        roles = tuple([message.role for message in messages])
        if roles not in self._shapes:
            # a conversation of a rare shape is not worth the probes
            learnt = learn_shape(roles, self._templated) if len(roles) <= _SHAPE_TURNS else None
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
        if not self.uses_template:
            text, spans = self._joined(messages, row.separator)
            shape = ANSWER_LAST if len(spans) == 1 and spans[0][1] == len(text) else 0
            return Rendered(text=text, spans=spans, where=row.where, shape=shape)
        try:
            text, spans = self._templated(messages)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            hint = _NO_TEMPLATE_HINT
            if self._system and "system" in str(error).lower():
                hint = f"this template takes no data.system_prompt; or {hint}"
            elif _begins_with_answer(row.messages):
                hint = f"the row begins with an answer: {_PUT_BEFORE}; or {hint}"
            bad.add(row.where, f"the chat template refuses this row: {error}", key="data.template", hint=hint)
            return None
        except _NotAPrefixError as error:
            bad.add(row.where, str(error), key="data.template", hint=error.hint)
            return None
        return Rendered(text=text, spans=spans, where=row.where, stray=self.holds_special(row.messages))

    def prompt(self, messages: Sequence[Message], separator: str) -> Rendered:
        """The text from which the next answer is generated, with the spans of the answers that it holds already."""
        turns = self._with_system(messages)
        if not self.uses_template:
            text, spans = self._joined((*turns, Message("assistant", "")), separator, close_last=False)
            return Rendered(text, spans[:-1], "prompt")
        text = self._apply(turns, generate=True)
        given: tuple[tuple[int, int], ...] = ()
        if any(message.role == "assistant" for message in turns):
            try:
                known, spans = self._templated(turns)
                given = tuple(span for span in spans if text.startswith(known[: span[1]]))
            except _NotAPrefixError:
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

    def _apply(self, messages: Sequence[Message], *, generate: bool = False) -> str:
        turns = [message.to_template() for message in messages]
        return str(
            self._tokenizer.apply_chat_template(
                turns, chat_template=self._template, tokenize=False, add_generation_prompt=generate
            )
        )

    def _templated(self, messages: Sequence[Message]) -> tuple[str, tuple[tuple[int, int], ...]]:
        try:
            return self._spans(messages)
        except _NotAPrefixError:
            # of a conversation that ends with a question no template shows the last answer as one that it asks for
            answered = _until_last_answer(messages)
            if len(answered) == len(messages):
                raise
            return self._spans(answered)

    def _spans(self, messages: Sequence[Message]) -> tuple[str, tuple[tuple[int, int], ...]]:
        text = self._apply(messages)
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
                    raise _NotAPrefixError("no turn before the row's answer asks for it", _PUT_BEFORE)
                raise _NotAPrefixError(
                    f"the chat template renders turn {index + 1} differently from the prompt that asks for it: "
                    f"{_fork(prompt, text)}"
                )
            end = self._end_of_turn(text, len(prompt), text if index == last else self._apply(messages[: index + 1]))
            if end <= len(prompt):
                raise _NotAPrefixError(f"the chat template leaves nothing of turn {index + 1} to learn")
            spans.append((len(prompt), end))
        # A template that ends the last answer with no token of its own would never teach the model to stop.
        if messages[last].role == "assistant" and not text[: spans[-1][1]].endswith(self._closers) and self._eos:
            text = text[: spans[-1][1]] + self._eos
            spans[-1] = (spans[-1][0], len(text))
        return text, tuple(spans)

    def _asked(self, before: Sequence[Message]) -> str | None:
        """The prompt of the answer behind these turns; None where the template has none for want of a question."""
        if any(message.role == "user" for message in before):
            return self._apply(before, generate=True)
        try:
            return self._apply(before, generate=True) if before else None
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
            raise _NotAPrefixError("the chat template changes an answer when more turns follow, and does not close it")
        return found + len(self._end_marker)

    def _probe_end_marker(self) -> str:
        try:
            text = self._apply(_PROBE).rstrip()
        except (TemplateError, TypeError, ValueError, KeyError):
            return ""  # A template of its own kind; its rows say what is wrong.
        return max((token for token in self._closers if text.endswith(token)), key=len, default="")

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


def _until_last_answer(messages: Sequence[Message]) -> Sequence[Message]:
    """The turns up to the last answer; none where there is no answer."""
    return messages[: max((at + 1 for at, one in enumerate(messages) if one.role == "assistant"), default=0)]


def _begins_with_answer(messages: Sequence[Message]) -> bool:
    return next((one.role for one in messages if one.role != "system"), "") == "assistant"


def untrained(row: Row, rendered: Rendered) -> bool:
    """Whether an answer of the row is not trained: it has no prompt, or is shown otherwise than it is asked for."""
    return isinstance(row, ChatRow) and len(rendered.spans) < sum(one.role == "assistant" for one in row.messages)


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, config: DataConfig, row_or_text: str | Mapping[str, Any]
) -> list[int]:
    """Token ids of what generation starts from: a token prefix of the same row's training tokens.

    Text counts as ``{"prompt": text}``. A row's answers may be absent; of a conversation that ends with an answer, the
    turns before that answer. Raises DataError for what is no row.
    """
    from eulerforge.data.tokenize import RowTokenizer

    given = {"prompt": row_or_text} if isinstance(row_or_text, str) else dict(row_or_text)
    parser = RowParser({} if isinstance(row_or_text, str) else config.schema)
    bad = BadRows()
    row = parser.parse(SourceRow(parser.with_blank_answer(given), 0, "prompt"), bad)
    if row is None:
        raise bad.error()
    return RowTokenizer(tokenizer).prompt(asked_of(Renderer(config, tokenizer), row))


def asked_of(renderer: Renderer, row: Row) -> Rendered:
    """The text before the last answer of a row; all of a text row."""
    if isinstance(row, TextRow):
        return Rendered(row.text, (), row.where)
    if isinstance(row, ProcessedRow):
        raise DataError(
            "a row of token ids has no text to start from",
            source=row.where,
            hint="give rows of text, of a prompt and its response, or of messages",
        )
    turns = row.messages[:-1] if row.messages[-1].role == "assistant" else row.messages
    try:
        return renderer.prompt(turns, row.separator)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"the chat template refuses this prompt: {error}", key="data.template", hint=_NO_TEMPLATE_HINT
        ) from error


def _clock(day: date) -> str:
    """A macro ``strftime_now`` that hides transformers' own, which takes no clock: it tells 0:00 of ``day``."""
    midnight = datetime.combine(day, time())
    letters = [*"aAwdbBmyYHIpMSfzZjUWcxXGuV", *(f"-{letter}" for letter in "dmHIMSj")]
    told = {f"%{letter}": midnight.strftime(f"%{letter}") for letter in letters}
    replaced = "".join(f" | replace({was!r}, {now!r})" for was, now in told.items())
    return "{% macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro +%}"


def today() -> date:
    """The day that a template is told where ``data.date`` names none."""
    return date.today()


def dated(config: DataConfig, tokenizer: PreTrainedTokenizerBase, began: str | None) -> DataConfig:
    """With ``data.date`` where the template writes it: as given, else the day ``began``, else today."""
    if config.date or config.format == "processed" or not Renderer(config, tokenizer).writes_the_day:
        return config
    return attrs.evolve(config, date=began or str(today()))


class _NotAPrefixError(Exception):
    """The template breaks the rule that a prompt is a prefix of its training row, or the row has no prompt."""

    def __init__(self, message: str, hint: str = _NO_TEMPLATE_HINT) -> None:
        super().__init__(message)
        self.hint = hint


def _fork(prompt: str, text: str) -> str:
    """Where two texts part: a few characters of each."""
    at = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))
    low = max(0, at - 10)
    return f"{prompt[low : at + 20]!r} in the prompt, {text[low : at + 20]!r} in the row"
