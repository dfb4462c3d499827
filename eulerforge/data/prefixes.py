"""The documents of a line: rows without what no label needs, and what rows begin with alike as one of its own.

Notable: what a causal model computes for a token depends on the tokens before it alone, so rows with a common prefix,
as those under one system prompt, have its hidden states in common, and its gradient is the sum of theirs. Once per
micro-batch is enough. And nothing that a row's loss is made of depends on its last label, or on what is behind it.
Like PagedAttention's shared prompts in vLLM (Kwon et al., 2023), here with a backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from eulerforge.data.tokenized import TokenizedRows

SHORTEST = 16
"""Tokens of a prefix that is worth a document of its own."""

Shared = dict[int, tuple[int, int]]
"""Of a row: the number of its group, and how many tokens all of the group begin with."""


@attrs.frozen
class Document:
    """Tokens ``first`` to ``last`` (not included) of a row; those before it are the line's document ``after``."""

    row: int
    first: int
    last: int
    after: int | None = None

    def __len__(self) -> int:
        return self.last - self.first


def shared_prefixes(rows: TokenizedRows, indices: Sequence[int]) -> Shared:
    """The rows that begin with ``SHORTEST`` untrained tokens or more as another one of ``indices`` does.

    At least one token of each row is not shared.
    """
    groups: dict[bytes, list[int]] = {}
    for index in indices:
        ids, _ = rows.row(index)
        if len(ids) > SHORTEST:
            groups.setdefault(ids[:SHORTEST].tobytes(), []).append(index)
    alike = [members for members in groups.values() if len(members) > 1]
    return {
        index: (number, tokens)
        for number, members in enumerate(alike)
        if (tokens := _common(rows, members)) >= SHORTEST
        for index in members
    }


def documents_of(rows: TokenizedRows, line: Sequence[int], *, share: bool, trim: bool = False) -> list[Document]:
    """The documents of a line in their order: its rows, each prefix that they share before the first that has it.

    With ``trim`` a row ends before its last label; of one that shares a prefix a token of its own stays.
    """
    shared = shared_prefixes(rows, line) if share else {}
    documents: list[Document] = []
    begun: dict[int, int] = {}
    for index in line:
        length = length_of(rows, index, trim=trim)
        if index not in shared:
            documents.append(Document(index, 0, length))
            continue
        group, tokens = shared[index]
        if group not in begun:
            begun[group] = len(documents)
            documents.append(Document(index, 0, tokens))
        documents.append(Document(index, tokens, max(length, tokens + 1), begun[group]))
    return documents


class Sizes:
    """How many tokens rows take in a micro-batch, where a prefix counts once; ``trim`` is as in ``documents_of``."""

    def __init__(self, rows: TokenizedRows, shared: Shared, *, trim: bool = False) -> None:
        self.rows, self.shared, self.trim = rows, shared, trim
        self._lengths: dict[int, int] = {}

    def of(self, index: int, part: Sequence[int] = ()) -> int:
        """Tokens that the row adds to the rows in ``part``."""
        length = self._length(index)
        if index not in self.shared:
            return length
        group, tokens = self.shared[index]
        length = max(length, tokens + 1)
        there = any(other in self.shared and self.shared[other][0] == group for other in part)
        return length - tokens if there else length

    def total(self, part: Sequence[int]) -> int:
        return sum(self.of(index, part[:at]) for at, index in enumerate(part))

    def longest_first(self, indices: Sequence[int]) -> list[int]:
        return sorted(indices, key=lambda index: -self._length(index))

    def _length(self, index: int) -> int:
        if index not in self._lengths:
            self._lengths[index] = length_of(self.rows, index, trim=self.trim)
        return self._lengths[index]


def length_of(rows: TokenizedRows, index: int, *, trim: bool) -> int:
    """Tokens of a row; with ``trim`` those before its last label, which its loss depends on, if one is predicted."""
    ids, labelled = rows.row(index)
    if not trim:
        return len(ids)
    trained = np.flatnonzero(labelled)
    return int(trained[-1]) if len(trained) and trained[-1] else len(ids)


def _common(rows: TokenizedRows, members: Sequence[int]) -> int:
    """Tokens with which all of them begin: of none the last, and none that is trained.

    A label is predicted for each row, so those of a prefix would fill more memory than the positions that it saves.
    """
    first, _ = rows.row(members[0])
    tokens = int(rows.lengths[members[0]])
    for index in members:
        ids, labelled = rows.row(index)
        tokens = min(tokens, len(ids) - 1, int(np.argmax(labelled)) if labelled.any() else tokens)
        others = np.flatnonzero(first[:tokens] != ids[:tokens])
        tokens = int(others[0]) if len(others) else tokens
    return tokens
