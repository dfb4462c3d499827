"""Rendered rows as token ids with a mask of what is trained, by the Rust tokenizer in batches.

Notable: the prompt is tokenized on its own and must be a prefix of the row's tokens. Tokenizers cut at special tokens
first, so of a prompt only what follows its last special token needs to be tokenized, which with a chat template is the
same few characters in every row. Where a token would reach over the
border between prompt and answer (a prompt that ends in a space, an answer that begins with a line break) the row is
tokenized in pieces, so that generation starts from exactly the tokens that were trained.
The BOS token is put in front by id, once: never by the post-processor, which would double a template's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eulerforge.data.read import BadRows
from eulerforge.data.render import Rendered
from eulerforge.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAIL_TOKENS = 16
_TAILS_KEPT = 4096
Tokens = tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]


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
        self._tails: dict[tuple[int, str], list[int]] = {}

    def encode(self, rendered: Sequence[Rendered]) -> list[Any]:
        """The rows' whole texts, encoded; the Rust code holds no lock, so another thread may work meanwhile."""
        return list(self._encode([row.text for row in rendered]))

    def rows(self, rendered: Sequence[Rendered], encoded: Sequence[Any], bad: BadRows) -> list[Tokens | None]:
        """(ids uint32, labelled uint8) of each row; None for a row that ``bad`` now names.

        ``encoded`` is what ``encode`` gave for the same rows.
        """
        all_ids: list[list[int]] = [encoding.ids for encoding in encoded]
        borders = self._borders(rendered, encoded, all_ids)
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
            results.append(self._masked(ids, ranges))
        return results

    def _borders(
        self, rendered: Sequence[Rendered], encoded: Sequence[Any], all_ids: Sequence[list[int]]
    ) -> list[list[int | None]]:
        """How many of a row's ids are the prompt before each of its spans; None where its tokens are not a prefix."""
        found: list[list[int | None]] = []
        open_places: list[tuple[int, int]] = []
        for number, (row, encoding, ids) in enumerate(zip(rendered, encoded, all_ids, strict=True)):
            found.append([])
            for start, _ in row.spans:
                known, border = self._border_behind_special(row.text, start, encoding, ids)
                if not known:
                    open_places.append((number, len(found[-1])))
                found[-1].append(border)
        prompts = [rendered[number].text[: rendered[number].spans[span][0]] for number, span in open_places]
        # only ids are compared: this variant does not track offsets
        alone = self._backend.encode_batch_fast(prompts, add_special_tokens=False) if prompts else ()
        for (number, span), encoding in zip(open_places, alone, strict=True):
            before = encoding.ids
            found[number][span] = len(before) if all_ids[number][: len(before)] == before else None
        return found

    def _border_behind_special(self, text: str, start: int, encoding: Any, ids: list[int]) -> tuple[bool, int | None]:
        """(whether it is known, the border) where a special token stands shortly before the end of the prompt."""
        place = encoding.char_to_token(start - 1) if start else None
        if place is None:
            return not start, 0
        for index in range(place, max(-1, place - _TAIL_TOKENS), -1):
            if ids[index] in self._special:
                tail = self._tail(ids[index], text[encoding.token_to_chars(index)[1] : start])
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

    def prompt(self, text: str) -> list[int]:
        """Ids of a prompt, with the BOS token where the tokenizer uses one."""
        return self._with_bos(self._encode([text])[0].ids)

    def _encode(self, texts: Sequence[str]) -> Any:
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if self._bos is None or ids[:1] == [self._bos] else [self._bos, *ids]

    def _masked(self, ids: list[int], ranges: Sequence[tuple[int, int]]) -> Tokens:
        full = self._with_bos(ids)
        shift = len(full) - len(ids)
        labelled = np.zeros(len(full), dtype=np.uint8)
        for first, end in ranges:
            labelled[first + shift : end + shift] = 1
        labelled[:1] = 0  # Nothing stands before the first token from which it could be predicted.
        return np.array(full, dtype=np.uint32), labelled

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
