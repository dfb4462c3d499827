"""Rendered rows as token ids with a mask of what is trained, by the Rust tokenizer in batches.

Notable: the prompt is tokenized on its own and must be a prefix of the row's tokens. Where a token would reach over the
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

    def rows(self, rendered: Sequence[Rendered], bad: BadRows) -> list[Tokens | None]:
        """(ids uint32, labelled uint8) of each row; None for a row that ``bad`` now names."""
        whole = self._encode([row.text for row in rendered])
        prompts = [row.text[:start] for row in rendered for start, _ in row.spans if start]
        # Only ids are compared: this variant does not track offsets.
        encoded = iter(self._backend.encode_batch_fast(prompts, add_special_tokens=False) if prompts else ())
        results: list[Tokens | None] = []
        for row, encoding in zip(rendered, whole, strict=True):
            ids: list[int] = encoding.ids
            ranges = []
            clean = True
            for start, end in row.spans:
                before: list[int] = next(encoded).ids if start else []
                clean = clean and ids[: len(before)] == before
                ranges.append((len(before), _tokens_until(encoding, row.text, end)))
            if not clean:
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
