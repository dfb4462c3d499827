"""Tokenized rows in flat arrays: a few big ones instead of a Python object per row.

Shapes: N rows, T tokens in all. tokens (T,) uint32, labelled (T,) uint8, offsets (N + 1,) int64, origins (N, 2) int64.
Row i is ``tokens[offsets[i]:offsets[i + 1]]``; its origin is (index into ``files``, line).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property

import attrs
import numpy as np
import numpy.typing as npt

ARRAYS = {"tokens": np.uint32, "labelled": np.uint8, "offsets": np.int64, "origins": np.int64}


@attrs.frozen(kw_only=True, eq=False, slots=False)
class TokenizedRows:
    """Rows of token ids with a mask of what is trained; the arrays may be memory-mapped and must not be written."""

    tokens: npt.NDArray[np.uint32]
    labelled: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    origins: npt.NDArray[np.int64]
    files: tuple[str, ...]

    @classmethod
    def gather(
        cls,
        rows: Iterable[tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]],
        origins: Sequence[tuple[int, int]],
        files: tuple[str, ...],
    ) -> TokenizedRows:
        """Flat arrays out of (ids, labelled) pairs and their (file index, line)."""
        pairs = list(rows)
        offsets = np.zeros(len(pairs) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids, _ in pairs], out=offsets[1:])
        return cls(
            tokens=np.concatenate([ids for ids, _ in pairs], dtype=np.uint32) if pairs else np.zeros(0, np.uint32),
            labelled=np.concatenate([mask for _, mask in pairs], dtype=np.uint8) if pairs else np.zeros(0, np.uint8),
            offsets=offsets,
            origins=np.array(origins, dtype=np.int64).reshape(-1, 2),
            files=files,
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
        """(ids, labelled) of one row, as views."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[part], self.labelled[part]

    def prompt(self, index: int) -> npt.NDArray[np.uint32]:
        """The ids before the first trained token: what generation starts from."""
        ids, labelled = self.row(index)
        return ids[: int(np.argmax(labelled))] if labelled.any() else ids

    def source(self, index: int) -> str:
        """``file:line`` of a row."""
        file, line = self.origins[index]
        return f"{self.files[int(file)]}:{int(line)}"

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, (N,)."""
        return np.diff(self.offsets)

    @property
    def label_tokens(self) -> int:
        """How many tokens are trained."""
        return int(np.count_nonzero(self.labelled))

    @cached_property
    def sha256(self) -> str:
        """Hash of all that training sees: tokens, mask and row borders."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.labelled, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def subset(self, indices: npt.NDArray[np.int64]) -> TokenizedRows:
        """The rows at ``indices``, in that order, as a copy."""
        return TokenizedRows.gather(
            [self.row(int(index)) for index in indices],
            [(int(file), int(line)) for file, line in self.origins[indices]],
            self.files,
        )
