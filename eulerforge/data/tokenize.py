"""Rendered rows as token ids with a mask of what is trained, by the Rust tokenizer in batches.

Notable: the prompt is tokenized on its own and must be a prefix of the row's tokens. Tokenizers cut at special tokens
first, so of a prompt only what follows its last special token needs to be tokenized, which with a chat template is the
same few characters in every row. Where a token would reach over the border between prompt and answer (a prompt that
ends in a space, an answer that begins with a line break) the row is tokenized in pieces, so that generation starts from
exactly the tokens that were trained.
The BOS token is put in front by id, once: never by the post-processor, which would double a template's own.
Rows of one template shape are masked together (``shape_masks``); the first and the last such row of every chunk are
masked by their characters too, and should they differ, all rows are from then on.
A plain row whose answer is its rest needs no characters either: its prompt's tokens say where the answer begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import numpy.typing as npt

from eulerforge.data.read import BadRows
from eulerforge.data.render import ANSWER_LAST, Rendered
from eulerforge.data.shape_masks import ShapeMasks
from eulerforge.data.tokenized import RowChunk
from eulerforge.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAIL_TOKENS = 16
_TAILS_KEPT = 4096
Borders = list[int | None]
Ids = npt.NDArray[np.uint32]
Tokens = tuple[Ids, npt.NDArray[np.uint8]]


@attrs.frozen
class Encoded:
    """Encodings of rows; those of ``fast`` rows know no characters, and some of these are in ``checks`` with them.

    ``borders`` are those of the other rows and of the checked ones; ``prompts`` the ids of each prompt by itself, where
    the row's shape does not tell its tokens.
    """

    encodings: list[Any]
    fast: list[bool]
    checks: dict[int, Any]
    borders: dict[int, Borders]
    prompts: dict[int, list[int]]


class RowTokenizer:
    """Tokenizes rendered rows. Raises DataError for a tokenizer without a Rust backend."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                f"{type(tokenizer).__name__} has no fast (Rust) version",
                hint="use a model folder that has a tokenizer.json",
            )
        self._backend = backend
        # Left behind by an earlier call of the tokenizer; it sets them again before each of its own.
        backend.no_truncation()
        backend.no_padding()
        self._bos = _bos_that_is_used(tokenizer, backend)
        self._anchor = tokenizer.eos_token or tokenizer.bos_token or ""
        self._special = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._shapes = ShapeMasks(self._special)
        self._tails: dict[tuple[int, str], list[int]] = {}

    def encode(self, rendered: Sequence[Rendered]) -> Encoded:
        """The rows' whole texts, encoded; the Rust code holds no lock, so another thread may work meanwhile.

        Without characters where the row's shape is known.
        """
        fast = [self._shapes.knows(row.shape) for row in rendered]
        by_shape = [place for place, known in enumerate(fast) if known]
        checked = sorted({*by_shape[:1], *by_shape[-1:]})
        slow = [place for place, known in enumerate(fast) if not known]
        whole = self._encode([rendered[place].text for place in [*slow, *checked]])
        found = dict(zip(slow, whole, strict=False))
        texts = [rendered[place].text for place in by_shape]
        found |= zip(by_shape, self._backend.encode_batch_fast(texts, add_special_tokens=False), strict=True)
        checks = dict(zip(checked, whole[len(slow) :], strict=True))
        places = [*slow, *checked]
        borders = dict(zip(places, self._borders([rendered[place] for place in places], whole), strict=True))
        asked = [place for place in by_shape if rendered[place].shape == ANSWER_LAST]
        alone = self._ids_alone([rendered[place].text[: rendered[place].spans[0][0]] for place in asked])
        prompts = dict(zip(asked, alone, strict=True))
        return Encoded([found[place] for place in range(len(fast))], fast, checks, borders, prompts)

    def block(self, rendered: Sequence[Rendered], encoded: Encoded, bad: BadRows) -> RowChunk:
        """The rows' tokens and masks, one after another; a row that ``bad`` now names has none."""
        lists = [encoding.ids for encoding in encoded.encodings]
        no_border = {place for place, alone in encoded.prompts.items() if lists[place][: len(alone)] != alone}
        answers = {
            place: len(lists[place]) - len(alone) for place, alone in encoded.prompts.items() if place not in no_border
        }
        if self._bos is not None:
            lists = [self._with_bos(ids) for ids in lists]
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        tokens = np.fromiter(chain.from_iterable(lists), np.uint32, int(offsets[-1]))
        labelled, missed = self._shapes.masked(rendered, encoded.fast, answers, tokens, offsets)
        checked = list(encoded.checks)
        checks = self.rows(
            [rendered[place] for place in checked],
            list(encoded.checks.values()),
            BadRows(),
            [encoded.borders[place] for place in checked],
        )
        for place, row in zip(encoded.checks, checks, strict=True):
            part = slice(int(offsets[place]), int(offsets[place + 1]))
            same = row is not None and np.array_equal(row[0], tokens[part]) and np.array_equal(row[1], labelled[part])
            if not same and place not in missed and place not in no_border:
                self._shapes.forget()
                missed = [place for place, known in enumerate(encoded.fast) if known]
                no_border = set()
                break
        slow = [place for place, known in enumerate(encoded.fast) if not known or place in no_border]
        rows = self.rows(
            [rendered[place] for place in slow],
            [encoded.encodings[place] for place in slow],
            bad,
            [[None] if place in no_border else encoded.borders[place] for place in slow],
        )
        again = [rendered[place] for place in missed]
        rows += self.rows(again, self._encode([row.text for row in again]), bad)
        other: dict[int, Tokens] = {}
        for place, row in zip([*slow, *missed], rows, strict=True):
            ids, mask = row if row is not None else (tokens[:0], labelled[:0])
            part = slice(int(offsets[place]), int(offsets[place + 1]))
            if len(ids) == lengths[place]:
                tokens[part], labelled[part] = ids, mask
            else:
                other[place] = (ids, mask)
        if not other:
            return RowChunk(tokens, labelled, lengths)
        parts = [(tokens[start:end], labelled[start:end]) for start, end in pairwise(offsets.tolist())]
        return RowChunk.of([other.get(place, part) for place, part in enumerate(parts)])

    def rows(
        self,
        rendered: Sequence[Rendered],
        encoded: Sequence[Any],
        bad: BadRows,
        borders: Sequence[Borders] | None = None,
    ) -> list[Tokens | None]:
        """(ids uint32, labelled uint8) of each row; None for a row that ``bad`` now names.

        ``encoded`` is what ``encode`` gave for the same rows, and ``borders`` too, where it did.
        """
        all_ids: list[list[int]] = [encoding.ids for encoding in encoded]
        if borders is None:
            borders = self._borders(rendered, encoded)
        results: list[Tokens | None] = []
        for row, encoding, ids, firsts in zip(rendered, encoded, all_ids, borders, strict=True):
            ranges = [
                (first or 0, _tokens_until(encoding, row.text, end))
                for first, (_, end) in zip(firsts, row.spans, strict=True)
            ]
            if None in firsts:
                pieces = self._in_pieces(row)
                if self._backend.decode(pieces[0], skip_special_tokens=False) != self._backend.decode(
                    ids, skip_special_tokens=False
                ):
                    bad.add(
                        row.where,
                        "a token reaches over the border of prompt and answer, and this tokenizer cannot cut there",
                        hint="end the prompt, or begin the answer, with a line break",
                    )
                    results.append(None)
                    continue
                ids, ranges = pieces
            full = self._with_bos(ids)
            shift = len(full) - len(ids)
            ranges = [(first + shift, end + shift) for first, end in ranges]
            results.append(_masked(full, ranges))
            if None not in firsts:
                self._shapes.learn(row.shape, full, ranges)
        return results

    def _borders(self, rendered: Sequence[Rendered], encoded: Sequence[Any]) -> list[Borders]:
        """How many of a row's ids are the prompt before each of its spans; None where its tokens are not a prefix."""
        found: list[Borders] = []
        open_places: list[tuple[int, int]] = []
        for number, (row, encoding) in enumerate(zip(rendered, encoded, strict=True)):
            ids = encoding.ids
            found.append([])
            for start, _ in row.spans:
                known, border = self._border_behind_special(row.text, start, encoding, ids)
                if not known:
                    open_places.append((number, len(found[-1])))
                found[-1].append(border)
        prompts = [rendered[number].text[: rendered[number].spans[span][0]] for number, span in open_places]
        for (number, span), alone in zip(open_places, self._ids_alone(prompts), strict=True):
            found[number][span] = len(alone) if encoded[number].ids[: len(alone)] == alone else None
        return found

    def _ids_alone(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of each prompt by itself; only ids are compared, so the variant that tracks no characters does."""
        if not prompts:
            return []
        return [encoding.ids for encoding in self._backend.encode_batch_fast(prompts, add_special_tokens=False)]

    def _border_behind_special(self, text: str, start: int, encoding: Any, ids: list[int]) -> tuple[bool, int | None]:
        """(whether it is known, the border) where a special token stands shortly before the end of the prompt."""
        place = encoding.char_to_token(start - 1) if start else None
        if place is None:
            return not start, 0
        for index in range(place, max(-1, place - _TAIL_TOKENS), -1):
            if ids[index] in self._special:
                first, end = encoding.token_to_chars(index)
                if end > start or text[first:end] != self._special[ids[index]]:
                    break  # an unknown word, or a token that takes spaces with it: text was not cut here
                tail = self._tail(ids[index], text[end:start])
                end = index + 1 + len(tail)
                return True, end if ids[index + 1 : end] == tail else None
        return False, None

    def _tail(self, special: int, text: str) -> list[int]:
        """Ids of ``text`` right behind a special token."""
        if not text:
            return []
        known = self._tails.get((special, text))
        if known is None:
            known = self._encode([self._special[special] + text])[0].ids[1:]
            if len(self._tails) < _TAILS_KEPT:
                self._tails[special, text] = known
        return known

    def prompt(self, prompt: Rendered) -> list[int]:
        """Ids of a prompt, with the BOS token where the tokenizer uses one; cut at earlier answers as its row is."""
        encoding = self._encode([prompt.text])[0]
        cut = None in self._borders([prompt], [encoding])[0]
        return self._with_bos(self._in_pieces(prompt)[0] if cut else encoding.ids)

    def _encode(self, texts: Sequence[str]) -> Any:
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if self._bos is None or ids[:1] == [self._bos] else [self._bos, *ids]

    def _in_pieces(self, row: Rendered) -> tuple[list[int], list[tuple[int, int]]]:
        """The row cut at the start of each answer.

        Later pieces are tokenized behind a special token, because some tokenizers put a space before the first word of
        a text.
        """
        starts = [start for start, _ in row.spans]
        ids: list[int] = list(self._encode([row.text[: starts[0]]])[0].ids)
        ranges = []
        for (start, end), following in zip(row.spans, [*starts[1:], len(row.text)], strict=True):
            text = self._anchor + row.text[start:following]
            encoding = self._encode([text])[0]
            skip = 1 if self._anchor else 0
            ranges.append((len(ids), len(ids) + _tokens_until(encoding, text, len(self._anchor) + end - start) - skip))
            ids += encoding.ids[skip:]
        return ids, ranges


def _masked(ids: list[int], ranges: Sequence[tuple[int, int]]) -> Tokens:
    labelled = np.zeros(len(ids), dtype=np.uint8)
    for first, end in ranges:
        labelled[first:end] = 1
    labelled[:1] = 0  # Nothing stands before the first token from which it could be predicted.
    return np.array(ids, dtype=np.uint32), labelled


def _tokens_until(encoding: Any, text: str, end: int) -> int:
    """How many tokens begin before character ``end``."""
    if end >= len(text):
        return len(encoding.ids)
    # A character outside of ASCII may be several tokens, of which char_to_token names the first.
    token = encoding.char_to_token(end - 1) if text[end - 1].isascii() else None
    if token is None:
        return sum(1 for start, _ in encoding.offsets if start < end)
    return int(token) + 1


def _bos_that_is_used(tokenizer: PreTrainedTokenizerBase, backend: Any) -> int | None:
    """The BOS id if the tokenizer itself puts it before a text; many have one that they never use."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    return int(bos) if backend.encode("a").ids[:1] == [bos] else None
