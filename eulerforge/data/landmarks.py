"""Where the trained spans of a row lie among its tokens, told by its special tokens alone.

The tokenizer can say which characters a token covers, at a third of its time and with Python work for each row.
Rows of one template shape have the same special tokens in the same order, and a span begins a few fixed tokens behind
one of them and ends with another: what one row of the shape showed is looked up in all others, a chunk at a time.
Notable: a row with any other special tokens, or other tokens before a span, is not found, and its characters are asked.
Letters: T tokens of N rows, M of them of one shape; S special tokens in each of these.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import attrs
import numpy as np
import numpy.typing as npt

LONGEST_TAIL = 16
"""Tokens between a special token and the span behind it; more are not fixed text."""
Ints = npt.NDArray[np.int64]


@attrs.frozen
class Landmarks:
    """The special tokens of a shape, and each span by them.

    A span is (which special token stands before it, None for the row's begin; the tokens in between; which one it ends
    with, None for the row's end).
    """

    special: tuple[int, ...]
    spans: tuple[tuple[int | None, tuple[int, ...], int | None], ...]


def learn(ids: Sequence[int], ranges: Sequence[tuple[int, int]], special: Collection[int]) -> Landmarks | None:
    """The landmarks of a row whose trained ``ranges`` are known; None where they do not lie at special tokens."""
    places = [place for place, token in enumerate(ids) if token in special]
    spans: list[tuple[int | None, tuple[int, ...], int | None]] = []
    for first, end in ranges:
        before = sum(place < first for place in places) - 1
        start = places[before] + 1 if before >= 0 else 0
        if first - start > (LONGEST_TAIL if before >= 0 else 0):
            return None
        if end != len(ids) and end - 1 not in places:
            return None
        last = None if end == len(ids) else places.index(end - 1)
        spans.append((before if before >= 0 else None, tuple(ids[start:first]), last))
    return Landmarks(tuple(ids[place] for place in places), tuple(spans))


@attrs.frozen
class SpecialPlaces:
    """Where special tokens lie in a chunk: ``places`` in its tokens, ``first`` of each row and how many it has (N,)."""

    tokens: npt.NDArray[np.uint32]
    places: Ints
    first: Ints
    counts: Ints

    @classmethod
    def of(cls, tokens: npt.NDArray[np.uint32], offsets: Ints, special: npt.NDArray[np.bool_]) -> SpecialPlaces:
        """``offsets`` (N + 1,) are the rows' borders; ``special`` (V,) says of each id whether it is one."""
        places = np.flatnonzero(special[np.minimum(tokens, len(special) - 1)])
        borders = np.searchsorted(places, offsets)
        return cls(tokens, places, borders[:-1], np.diff(borders))

    def spans(self, landmarks: Landmarks, rows: Ints, offsets: Ints) -> tuple[npt.NDArray[np.bool_], list[Ints]]:
        """Of ``rows`` (M,): which are as the landmarks say (M,), and begin and end of each span (M, 2) of these.

        Begin and end are places in the chunk's tokens; those of rows that are not found mean nothing.
        """
        found = self.counts[rows] == len(landmarks.special)
        wanted = np.array(landmarks.special, dtype=np.int64)
        index_MS = self.first[rows][:, None] + np.arange(len(wanted))
        places_MS = np.take(np.append(self.places, 0), index_MS, mode="clip")
        found &= (np.take(self.tokens, places_MS, mode="clip") == wanted).all(axis=1)
        spans = []
        for before, tail, last in landmarks.spans:
            begin = offsets[rows] if before is None else places_MS[:, before] + 1
            end = offsets[rows + 1] if last is None else places_MS[:, last] + 1
            for number, token in enumerate(tail):
                found &= np.take(self.tokens, begin + number, mode="clip") == token
            begin = begin + len(tail)
            found &= begin <= end
            spans.append(np.stack([begin, end], axis=1))
        return found, spans
