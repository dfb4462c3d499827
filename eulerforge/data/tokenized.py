"""Tokenized rows in flat arrays: a few big ones instead of a Python object per row.

Shapes: N rows, T tokens in all. tokens (T,) uint32, labelled (T,) uint8, offsets (N + 1,) int64, origins (N, 2) int64.
Row i is ``tokens[offsets[i]:offsets[i + 1]]``; its origin is (index into ``files``, place in it: ``read.place_text``).
A subset shares the arrays and keeps only which rows it picked, so that holding rows out of a million copies none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import attrs
import numpy as np
import numpy.typing as npt

from eulerforge.data.read import place_text

ARRAYS = {"tokens": np.uint32, "labelled": np.uint8, "offsets": np.int64, "origins": np.int64}


@attrs.frozen(kw_only=True, eq=False, slots=False)
class TokenizedRows:
    """Rows of token ids with a mask of what is trained; the arrays may be memory-mapped and must not be written.

    ``picked`` is None for all rows of the arrays, else the indices (M,) of those that belong here, in order.
    """

    tokens: npt.NDArray[np.uint32]
    labelled: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    origins: npt.NDArray[np.int64]
    files: tuple[str, ...]
    picked: npt.NDArray[np.int64] | None = None

    @classmethod
    def gather(
        cls,
        rows: Sequence[tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]],
        origins: Sequence[tuple[int, int]],
        files: Sequence[str],
    ) -> TokenizedRows:
        """Flat arrays out of (ids, labelled) pairs and their (file index, line)."""
        collected = MemoryRows()
        collected.add(RowChunk.of(rows, origins))
        return collected.finish(files)

    def __len__(self) -> int:
        return len(self.offsets) - 1 if self.picked is None else len(self.picked)

    def _place(self, index: int) -> int:
        return index if self.picked is None else int(self.picked[index])

    def row(self, index: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
        """(ids, labelled) of one row, as views."""
        place = self._place(index)
        part = slice(int(self.offsets[place]), int(self.offsets[place + 1]))
        return self.tokens[part], self.labelled[part]

    def prompt(self, index: int) -> npt.NDArray[np.uint32]:
        """The ids before the first trained token: what generation starts from."""
        ids, labelled = self.row(index)
        return ids[: int(np.argmax(labelled))] if labelled.any() else ids

    def origin(self, index: int) -> tuple[int, int]:
        """(index into ``files``, place in it) of a row."""
        file, place = self.origins[self._place(index)]
        return int(file), int(place)

    def source(self, index: int) -> str:
        """``file:line`` of a row, ``file:line[i]`` in a JSON array."""
        file, place = self.origin(index)
        return place_text(self.files[file], place)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, (N,)."""
        lengths = np.diff(self.offsets)
        return lengths if self.picked is None else lengths[self.picked]

    @property
    def token_count(self) -> int:
        """How many tokens there are."""
        return int(self.lengths.sum())

    @property
    def highest_id(self) -> int:
        """The highest token id of the arrays, rows that are not picked included; -1 without any."""
        return int(self.tokens.max()) if len(self.tokens) else -1

    @cached_property
    def label_tokens(self) -> int:
        """How many tokens are trained."""
        if self.picked is None:
            return int(np.count_nonzero(self.labelled))
        per_row = np.add.reduceat(self.labelled, self.offsets[:-1], dtype=np.int64)
        return int(per_row[self.picked].sum())

    @cached_property
    def sha256(self) -> str:
        """Hash of all that training sees: tokens, mask, row borders and which rows are picked."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.labelled, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        if self.picked is not None:
            digest.update(np.ascontiguousarray(self.picked).data)
        return digest.hexdigest()

    def subset(self, indices: npt.NDArray[np.int64]) -> TokenizedRows:
        """The rows at ``indices``, in that order; the arrays are shared."""
        picked = np.asarray(indices, dtype=np.int64)
        return attrs.evolve(self, picked=picked if self.picked is None else self.picked[picked])


@attrs.frozen(eq=False)
class RowChunk:
    """N rows on their way into the arrays: tokens and labelled (T,) one after another, lengths (N,), origins (N, 2)."""

    tokens: npt.NDArray[np.uint32]
    labelled: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.int64]
    origins: npt.NDArray[np.int64] = attrs.field(factory=lambda: np.zeros((0, 2), np.int64))

    @classmethod
    def of(
        cls,
        rows: Sequence[tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]],
        origins: npt.ArrayLike = (),
    ) -> RowChunk:
        """A chunk of (ids, labelled) pairs."""
        return cls(
            np.concatenate([*(ids for ids, _ in rows), np.zeros(0, np.uint32)], dtype=np.uint32),
            np.concatenate([*(mask for _, mask in rows), np.zeros(0, np.uint8)], dtype=np.uint8),
            np.fromiter((len(ids) for ids, _ in rows), np.int64, len(rows)),
            np.array(origins, dtype=np.int64).reshape(-1, 2),
        )

    def starts(self) -> npt.NDArray[np.int64]:
        """Where each row begins, (N,)."""
        return np.cumsum(self.lengths) - self.lengths

    def select(self, rows: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int64]) -> RowChunk:
        """Those of the rows (N,) that are wanted, each with its first ``lengths`` (N,) tokens."""
        origins = self.origins[rows] if len(self.origins) else self.origins
        lengths = np.where(rows, lengths, 0)
        if np.array_equal(lengths, self.lengths):
            return RowChunk(self.tokens, self.labelled, self.lengths[rows], origins)
        places = np.arange(len(self.tokens)) - np.repeat(self.starts(), self.lengths)
        wanted = places < np.repeat(lengths, self.lengths)
        return RowChunk(self.tokens[wanted], self.labelled[wanted], lengths[rows], origins)

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """The chunk as flat arrays; ``offsets`` holds the rows' lengths here."""
        return {"tokens": self.tokens, "labelled": self.labelled, "offsets": self.lengths, "origins": self.origins}


class MemoryRows:
    """Collects chunks in memory; the cache's writer does the same on disk."""

    def __init__(self) -> None:
        self._parts: list[dict[str, npt.NDArray[np.generic]]] = []

    def add(self, chunk: RowChunk) -> None:
        self._parts.append(chunk.arrays())

    def finish(self, files: Sequence[str]) -> TokenizedRows:
        parts = self._parts or [RowChunk.of([]).arrays()]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in ARRAYS}
        joined["offsets"] = np.concatenate([np.zeros(1, np.int64), np.cumsum(joined["offsets"])])
        return TokenizedRows(files=tuple(files), **joined)  # type: ignore[arg-type]
