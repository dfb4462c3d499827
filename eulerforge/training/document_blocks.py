"""How packed documents are cut into blocks for ``training/document_products.py``, and where their rows lie for it.

Notable: the query heads that share a key head are rows of one product, so keys and values are never repeated. Queries
are brought into an order in which a block of them lies together, keys and values into one in which a document does.
Letters as there: M = N x Q rows of queries, P = N x K of keys; of one document T keys; of one block R rows and S keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache

import attrs
import torch

BLOCK = 96
"""Tokens of a block: the scores of a block and its probabilities stay in the cache."""
KEPT_SHARE = 2
"""A document's probabilities are kept if they need at most so many times the memory of its q, k and v."""

Borders = tuple[tuple[int, ...], tuple[int | None, ...]]
"""Lengths of the documents, and after which others they stand."""


@attrs.frozen
class Block:
    """Some tokens of a document: their rows of M, those of its keys that they may see, and where their probabilities
    are kept, if so."""

    tokens: int
    rows: slice
    keys: slice
    shape: tuple[int, int, int]
    kept: slice | None

    def of(self, x_MD: torch.Tensor) -> torch.Tensor:
        """(K, R, D)"""
        return x_MD[self.rows].view(*self.shape[:2], -1)

    def part_of(self, kept: torch.Tensor) -> torch.Tensor | None:
        return None if self.kept is None else kept[self.kept].view(self.shape)

    def add(self, sums_KTD: torch.Tensor, part_KSD: torch.Tensor) -> None:
        """To what is nothing yet at a document's last block, with which it begins."""
        if self.keys.stop == sums_KTD.shape[1]:
            sums_KTD[:, : self.keys.start] = 0
            sums_KTD[:, self.keys.start :] = part_KSD
        else:
            sums_KTD[:, self.keys].add_(part_KSD)


@attrs.frozen
class Document:
    """Its rows of P, as many key heads, its blocks, and the document from which it goes on."""

    rows: slice
    key_heads: int
    blocks: tuple[Block, ...]
    after: Document | None

    def of(self, x_PD: torch.Tensor) -> torch.Tensor:
        """(K, its own tokens, D)"""
        return x_PD[self.rows].view(self.key_heads, -1, x_PD.shape[1])

    def keys_of(self, x_PD: torch.Tensor) -> torch.Tensor:
        """(K, T, D)"""
        own = self.of(x_PD)
        return own if self.after is None else torch.cat([self.after.of(x_PD), own], 1)

    def sums_in(self, sums_PD: torch.Tensor) -> torch.Tensor:
        """(K, T, D) for its blocks to add to: the sums themselves where the keys are its own alone."""
        if self.after is None:
            return self.of(sums_PD)
        tokens = [(part.rows.stop - part.rows.start) // self.key_heads for part in (self.after, self)]
        return sums_PD.new_empty(self.key_heads, sum(tokens), sums_PD.shape[1])

    def add_sums(self, sums_PD: torch.Tensor, found_KTD: torch.Tensor) -> None:
        if self.after is not None:
            before_KTD = self.after.of(sums_PD)
            before_KTD.add_(found_KTD[:, : before_KTD.shape[1]])
            self.of(sums_PD).copy_(found_KTD[:, before_KTD.shape[1] :])


@lru_cache(maxsize=16)
def documents_of(
    borders: Borders, heads: int, key_heads: int, window: int | None, size: int, most: int
) -> tuple[Document, ...]:
    """The documents in blocks of ``size`` tokens; kept are at most ``most`` probabilities per token of one.

    All layers ask for those of the same batch.
    """
    lengths, after = borders
    documents: list[Document] = []
    start = at = 0
    for number, length in enumerate(lengths):
        goes_on = after[number] if after else None
        before = 0 if goes_on is None else lengths[goes_on]
        mine = []
        for first in range(0, length, size):
            last = min(first + size, length)
            low = 0 if window is None else max(0, before + first - window + 1)
            rows = slice((start + first) * heads, (start + last) * heads)
            mine.append((last - first, rows, slice(low, before + last)))
        shapes = [(key_heads, tokens * (heads // key_heads), keys.stop - keys.start) for tokens, _, keys in mine]
        fits = sum(map(math.prod, shapes)) <= most * length
        blocks = []
        for (tokens, rows, keys), shape in zip(mine, shapes, strict=True):
            end = at + math.prod(shape) if fits else at
            blocks.append(Block(tokens, rows, keys, shape, slice(at, end) if end > at else None))
            at = end
        own = slice(start * key_heads, (start + length) * key_heads)
        documents.append(Document(own, key_heads, tuple(blocks), None if goes_on is None else documents[goes_on]))
        start += length
    return tuple(documents)


@attrs.frozen(eq=False)
class Order:
    """Where the rows of D numbers, which lie token by token and head by head, go; and back."""

    there: torch.Tensor
    back: torch.Tensor

    def of(self, x_NHD: torch.Tensor) -> torch.Tensor:
        return x_NHD.reshape(-1, x_NHD.shape[-1]).index_select(0, self.there)

    def undone(self, x_MD: torch.Tensor, heads: int) -> torch.Tensor:
        return x_MD.index_select(0, self.back).view(-1, heads, x_MD.shape[1])


@lru_cache(maxsize=4)
def orders_of(
    lengths: tuple[int, ...], heads: int, key_heads: int, size: int, device: torch.device
) -> tuple[Order, Order]:
    """Of queries by block, and of keys by document: key heads first in each."""
    blocks = [min(size, length - first) for length in lengths for first in range(0, length, size)]
    with torch.inference_mode(False):  # one that evaluation made, and a cache keeps, is used in training too
        return _order(blocks, key_heads, heads // key_heads, device), _order(lengths, key_heads, 1, device)


def _order(parts: Sequence[int], key_heads: int, group: int, device: torch.device) -> Order:
    rows = torch.arange(sum(parts) * key_heads * group).view(-1, key_heads, group)
    there = torch.cat([part.transpose(0, 1).flatten() for part in rows.split(list(parts))])
    back = torch.empty_like(there)
    back[there] = torch.arange(len(there))
    return Order(there.int().to(device), back.int().to(device))


def kept_numbers(
    documents: Mapping[tuple[int, int], int], heads: int, key_heads: int, width: int, window: int | None
) -> int:
    """Probabilities that a layer keeps from its forward to its backward pass, besides q, k and v.

    Args:
        documents: how many there are of each length, with so many tokens before that another document holds; what one
            keeps does not depend on the others.
    """
    most = most_kept(heads, key_heads, width)
    kept = 0
    for (length, before), count in documents.items():
        borders = ((before, length), (None, 0)) if before else ((length,), ())
        *_, document = documents_of(borders, heads, key_heads, window, BLOCK, most)
        kept += count * numbers_kept((document,))
    return kept


def numbers_kept(documents: tuple[Document, ...]) -> int:
    return sum(math.prod(block.shape) for one in documents for block in one.blocks if block.kept is not None)


def most_kept(heads: int, key_heads: int, width: int) -> int:
    """Probabilities per token that a document may keep."""
    return KEPT_SHARE * (heads + 2 * key_heads) * width


@contextmanager
def none_kept() -> Iterator[None]:
    """No probabilities are kept for a while: for who counts what a layer keeps per token, and adds them by itself."""
    global KEPT_SHARE
    share, KEPT_SHARE = KEPT_SHARE, 0
    try:
        yield
    finally:
        KEPT_SHARE = share
