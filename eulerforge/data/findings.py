"""What is wrong with rows that could be trained on nevertheless: counted, with the first places of each kind.

An answer that ``data.max_length`` cuts before the token that ends it teaches the model to go on; a special token that
no template placed (a BOS inside of a row, a token's text written out in a message) ends or begins turns where there are
none. A few such rows do no harm and are said; a share of them beyond what the preset allows stops the run.
Notable: looked for in every row while it is tokenized, and kept with the cached rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import attrs
import numpy as np

from eulerforge.data.read import place_text, places_text
from eulerforge.data.rows import Row
from eulerforge.data.tokenized import RowChunk
from eulerforge.errors import Problem

CUT = "answers cut before the token that ends them"
DOUBLE_BOS = "double BOS"
INNER_BOS = "a BOS inside of the row"
WRITTEN = "a special token written out in a message"
MORE_BOS = "more than one BOS token (as Llama 2's template writes them; most have one)"
"""Behind an EOS each: right for some families, so it is said and stops no run."""
UNTRAINED = (
    "earlier answers that are not trained, because the chat template shows them otherwise in what follows, or no turn"
    " asks for them"
)
"""As of reasoning models, whose prompt opens what is left out of all but the last answer, or where a conversation
begins with an answer: said, and stops no run."""
STRAY = (DOUBLE_BOS, INNER_BOS, WRITTEN)
SHOWN = 5
Ids = np.ndarray[Any, Any]


@attrs.frozen(kw_only=True)
class Finding:
    """``count`` rows of a kind; ``first`` are the sources (``file:line``) of the first few."""

    count: int
    first: tuple[str, ...]

    def places(self) -> str:
        """``lines 3, 9 of rows.jsonl and 40 more``."""
        return places_text(self.first, self.count)


class RowFindings:
    """Collects while rows are tokenized."""

    def __init__(self, tokenizer: Any) -> None:
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._special = special_ids(tokenizer)
        # where the tokenizer puts none before a text it marks no begin: SmolLM2's, which begins ChatML's turns
        self._begins_texts = self._bos is not None and tokenizer("a")["input_ids"][:1] == [self._bos]
        self._found: dict[str, tuple[int, list[tuple[int, int]]]] = {}

    def ending(self, row: Row, ids: Ids, labelled: Ids, origin: tuple[int, int]) -> None:
        """Note a row whose trained answer is cut, of those that have as many tokens as a row may have."""
        if row.kind == "text" or self._eos is None:
            return
        if int(ids[np.flatnonzero(labelled)[-1]]) not in self._special:
            self._note(CUT, origin)

    def untrained(self, chunk: RowChunk, rows: Iterable[int]) -> None:
        """Note these rows of the chunk, whose earlier answers are not trained."""
        for row in rows:
            self._note(UNTRAINED, chunk.origins[row])

    def stray(self, chunk: RowChunk, written: Set[int]) -> None:
        """Note each row of the chunk with a special token out of place, once; in ``written`` a message holds one."""
        for row in sorted(written):
            self._note(WRITTEN, chunk.origins[row])
        if self._bos is None:
            return
        tokens, ends = chunk.tokens, np.cumsum(chunk.lengths)
        found = np.flatnonzero(tokens == self._bos)
        if not len(found):
            return
        rows = np.searchsorted(ends, found, side="right")
        starts = np.concatenate([np.zeros(1, np.int64), ends])[rows]
        closed = np.cumsum(tokens == self._eos) if self._eos is not None else np.zeros(len(tokens), np.int64)
        noted, last = set(written), -1
        for position, start, row in zip(found.tolist(), starts.tolist(), rows.tolist(), strict=True):
            begun, last = max(last, start), position
            if position == start or row in noted:
                continue
            double = tokens[position - 1] == self._bos and position == start + 1
            # behind an EOS it begins a sequence or a turn of its own: Llama 2's template, and SmolLM2's, whose BOS and
            # EOS are ChatML's <|im_start|> and <|im_end|>
            if double or (self._eos != self._bos and closed[position] == closed[begun]):
                noted.add(row)
                self._note(DOUBLE_BOS if double else INNER_BOS, chunk.origins[row])
        if self._begins_texts:
            for row in np.flatnonzero(np.bincount(rows, minlength=len(ends)) > 1).tolist():
                if row not in noted:
                    self._note(MORE_BOS, chunk.origins[row])

    def _note(self, name: str, origin: Sequence[int]) -> None:
        count, first = self._found.get(name, (0, []))
        self._found[name] = (count + 1, [*first, (int(origin[0]), int(origin[1]))][:SHOWN])

    def to_facts(self) -> dict[str, Any]:
        """As it stands in the cache: {kind: [count, [[file index, place], ...]]}."""
        return {name: [count, [list(origin) for origin in first]] for name, (count, first) in self._found.items()}


def findings_of(facts: Mapping[str, Any], files: Sequence[str]) -> dict[str, Finding]:
    """What ``to_facts`` gave, with the files' names of today."""
    return {
        name: Finding(count=count, first=tuple(place_text(files[file], place) for file, place in first))
        for name, (count, first) in facts.items()
    }


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that are no text."""
    special = {int(index) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | {int(index) for index in tokenizer.all_special_ids}


def too_many(
    findings: Mapping[str, Finding], rows: int, *, longest: int, max_length: int, cut: float, stray: float
) -> Iterator[Problem]:
    """The errors of a part with ``rows`` rows in use, of which ``longest`` tokens is the longest one uncut.

    ``cut`` and ``stray`` are the shares that are allowed, 1 for any.
    """
    found = findings.get(CUT)
    if found and found.count > cut * rows:
        cure = "the tool that made the ids cut them at this length: make longer ones"
        if longest > max_length:
            cure = f"--set data.max_length={longest} keeps all of them whole, data.on_long=drop leaves them out"
        yield Problem(
            message=f"cut answer: {found.count:,} of {rows:,} rows ({found.count / rows:.0%}) are cut before the token"
            f" that ends their answer, so the model would not learn to stop: {found.places()}",
            source=found.first[0],
            key="data.max_length",
            hint=f"{cure}; data.max_cut_answers=1 trains on them as they are",
        )
    strays = {name: findings[name] for name in STRAY if name in findings}
    total = sum(one.count for one in strays.values())
    if total > stray * rows and strays:
        named = "; ".join(f"{name}: {one.count:,} of {rows:,} rows, {one.places()}" for name, one in strays.items())
        yield Problem(
            message=f"special tokens out of place: {named}",
            source=next(iter(strays.values())).first[0],
            key="data.path",
            hint="take their text out of the rows (a template or the tokenizer puts it there); rows that are rendered"
            " already want data.template=none; data.max_stray_specials=1 trains on them",
        )
