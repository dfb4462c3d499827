"""Rows that stand twice: counted within the training rows, refused between them and the held-out rows.

Notable: a row is known by 64 bits, a sum of mixed (token, place) pairs, computed over the flat arrays piece by piece;
a million rows take a few seconds and 8 MB. Two different rows of a million share their bits once in 30 million runs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eulerforge.data.tokenized import TokenizedRows
from eulerforge.errors import DataError

Hashes = npt.NDArray[np.uint64]
_PIECE = 1 << 20  # tokens
SHOWN = 5


def row_hashes(rows: TokenizedRows) -> Hashes:
    """64 bits of each row's token ids, (N,), in the order of ``rows``."""
    offsets = rows.offsets
    hashes = np.zeros(len(offsets) - 1, dtype=np.uint64)
    first = 0
    while first < len(hashes):
        # rows up to a piece of tokens, one at least
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _PIECE, side="right")) - 1)
        begins = offsets[first:last]
        start, end = int(offsets[first]), int(offsets[last])
        places = np.arange(start, end) - np.repeat(begins, np.diff(offsets[first : last + 1]))
        mixed = _mixed(rows.tokens[start:end].astype(np.uint64) | (places.astype(np.uint64) << np.uint64(32)))
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
        hashes[first:last] = sums[offsets[first + 1 : last + 1] - start] - sums[begins - start]
        first = last
    return hashes if rows.picked is None else hashes[rows.picked]


def _mixed(values: Hashes) -> Hashes:
    """splitmix64's finalizer (Steele and others, 2014): every bit of a value moves every bit of the result."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def count_repeated(hashes: Hashes) -> int:
    """How many rows are a repetition of an earlier one."""
    ordered = np.sort(hashes)  # np.unique imports numpy.ma
    return int((ordered[1:] == ordered[:-1]).sum())


def shared_rows(
    train: TokenizedRows, validation: TokenizedRows, hashes: tuple[Hashes, Hashes]
) -> tuple[int, list[tuple[str, str]]]:
    """How many held-out rows are training rows too, and (held-out, training) sources of the first few."""
    trained, held_out = hashes
    both = np.flatnonzero(np.isin(held_out, trained))
    shown = []
    for index in both[:SHOWN]:
        twin = int(np.flatnonzero(trained == held_out[index])[0])
        shown.append((validation.source(int(index)), train.source(twin)))
    return len(both), shown


def overlap_error(count: int, shown: list[tuple[str, str]]) -> DataError:
    places = ", ".join(f"{held_out} is {trained}" for held_out, trained in shown)
    rest = f" and {count - len(shown):,} more" if count > len(shown) else ""
    return DataError(
        f"{count:,} held-out rows are training rows too, so their loss would say nothing of new rows: {places}{rest}",
        key="data.validation",
        hint="take the repeated rows out, or --set data.validation.allow_overlap=true",
    )
