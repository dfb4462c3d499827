"""A chat template seen as fixed text with gaps, where it proves to be that.

Rendering a row through jinja costs ten times what parsing it costs, and most templates only put each message between
fixed texts. For a sequence of roles the template is rendered with a handful of probing contents; if every rendering is
the same fixed text with the contents in between, rows of that shape are joined instead of rendered.
Notable: this is evidence, not proof, so rows whose content could steer a template go the slow way: those with
characters of markup, and those that hold a text which the template itself names. The caller compares some rows of every
chunk with the template, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import attrs
import jinja2

from eulerforge.data.turns import Message

Span = tuple[int, int]
Rendering = tuple[str, tuple[Span, ...]]
Render = Callable[[Sequence[Message]], Rendering]

# What templates look for in a content: tags, tool calls, braces; and what they trim.
_MARKUP = re.compile(r"[<>\[\]{}|\x00-\x08\x0b-\x1f]")
_STEERING = _MARKUP.pattern + r"|^\s|\s$|^/|^$"
# Names of roles and keys: a template compares roles with them, and ordinary text is full of them.
_ROLE_WORDS = {"user", "assistant", "system", "tool", "model", "role", "content", "human", "function", "developer"}
_PROBES = (
    "first probe {}",
    "Second probe {}: 1, 2.\n\nThird\tline; 'quoted' \"twice\" & done?",
    "ünïcode {} 日本語 🙂",
    "user {} assistant system tool",
    "{} think /no_think reasoning",
)


def cues_of(template: str) -> re.Pattern[str]:
    """Matches a content that holds markup, or one of the texts that the template names."""
    try:
        tokens = list(jinja2.Environment(autoescape=True).lex(template))
        # jinja's own way to read its string literals, which may span lines
        named = {
            value[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
            for _, kind, value in tokens
            if kind == "string"
        }
    except (jinja2.TemplateError, UnicodeDecodeError):
        return re.compile("")  # matches everything: all rows are rendered
    cues = sorted(name for name in named if name.strip() and name not in _ROLE_WORDS and not _MARKUP.search(name))
    return re.compile("|".join([_STEERING, *map(re.escape, cues)]))


@attrs.frozen
class TemplateShape:
    """``pieces`` are the fixed texts around the contents, one more than there are messages.

    A border of a span is (how many contents stand before it, its distance from the end of the last of them).
    """

    pieces: tuple[str, ...]
    borders: tuple[tuple[tuple[int, int], tuple[int, int]], ...]

    def fill(self, messages: Sequence[Message]) -> Rendering:
        """The text and its spans for these contents."""
        parts = [self.pieces[0]]
        ends = [0]
        length = len(self.pieces[0])
        for message, piece in zip(messages, self.pieces[1:], strict=True):
            length += len(message.content)
            ends.append(length)
            parts += (message.content, piece)
            length += len(piece)
        spans = [(ends[first[0]] + first[1], ends[last[0]] + last[1]) for first, last in self.borders]
        return "".join(parts), tuple(spans)


def is_plain(messages: Sequence[Message], cues: re.Pattern[str]) -> bool:
    """Whether no content could steer the template."""
    search = cues.search
    for message in messages:  # noqa: SIM110 - a generator would double the time, for each row
        if search(message.content):
            return False
    return True


def has_markup(text: str) -> bool:
    """Whether a content with this text in it is never plain."""
    return _MARKUP.search(text) is not None


def learn_shape(roles: Sequence[str], render: Render) -> TemplateShape | None:
    """The shape of a sequence of roles; None where the template does more than put contents between fixed texts.

    ``render`` may raise whatever a template raises; that is None too.
    """
    probes = [
        [Message(role, probe.format(f"{turn}x{number}")) for turn, role in enumerate(roles)]
        for number, probe in enumerate(_PROBES)
    ]
    try:
        shape = _cut(probes[0], *render(probes[0]))
        if shape is None or any(shape.fill(probe) != render(probe) for probe in probes):
            return None
    except Exception:  # noqa: BLE001 - a template may raise anything; its rows then say what is wrong, one by one
        return None
    return shape


def _cut(messages: Sequence[Message], text: str, spans: Sequence[Span]) -> TemplateShape | None:
    pieces: list[str] = []
    ends = [0]
    for message in messages:
        start = text.find(message.content, ends[-1])
        if start < 0 or text.count(message.content) != 1:
            return None
        pieces.append(text[ends[-1] : start])
        ends.append(start + len(message.content))
    pieces.append(text[ends[-1] :])

    def border(position: int) -> tuple[int, int] | None:
        before = max(index for index, end in enumerate(ends) if end <= position)
        # a border inside of a content would move with it
        inside = before < len(messages) and position > ends[before] + len(pieces[before])
        return None if inside else (before, position - ends[before])

    found = [(border(start), border(end)) for start, end in spans]
    if any(first is None or last is None for first, last in found):
        return None
    return TemplateShape(tuple(pieces), tuple((first, last) for first, last in found if first and last))
