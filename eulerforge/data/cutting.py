"""Rows made to fit data.max_length, a chunk at a time, and counts of what became of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from eulerforge.data.tokenized import RowChunk

TOO_LONG = "longer than data.max_length"
NO_LABELS = "no trained token within data.max_length"


@attrs.define(kw_only=True)
class Cutter:
    """Cuts or drops what is longer than ``max_length`` tokens, and drops what then has no trained token.

    ``lost`` counts the tokens that went with it, ``longest`` the tokens of the longest row in use before it was cut.
    """

    max_length: int
    drop_long: bool
    dropped: Counter[str] = attrs.field(factory=Counter)
    truncated: int = 0
    lost: int = 0
    longest: int = 0

    def cut(self, chunk: RowChunk) -> tuple[RowChunk, npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The rows in use (N,), which of the chunk's they are, and which of them were cut (N,)."""
        over = chunk.lengths > self.max_length
        kept = np.minimum(chunk.lengths, self.max_length)
        starts = chunk.starts()
        trained = np.concatenate([np.zeros(1, np.int64), np.cumsum(chunk.labelled, dtype=np.int64)])
        useful = trained[starts + kept] > trained[starts]
        too_long = over & self.drop_long
        self._drop(TOO_LONG, chunk.lengths[too_long])
        self._drop(NO_LABELS, chunk.lengths[~useful & ~too_long])
        used = useful & ~too_long
        over &= used
        self.truncated += int(over.sum())
        self.lost += int((chunk.lengths - kept)[over].sum())
        self.longest = max(self.longest, int(chunk.lengths[used].max(initial=0)))
        return chunk.select(used, kept), np.flatnonzero(used), over[used]

    def _drop(self, why: str, lengths: npt.NDArray[np.int64]) -> None:
        if len(lengths):
            self.dropped[why] += len(lengths)
            self.lost += int(lengths.sum())

    def to_facts(self) -> dict[str, Any]:
        """As the cache keeps it."""
        return {
            "dropped": dict(self.dropped),
            "truncated": self.truncated,
            "lost_tokens": self.lost,
            "longest": self.longest,
        }
