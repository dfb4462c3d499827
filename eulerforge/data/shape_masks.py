"""The mask of a chunk's rows by their shapes, one shape at a time instead of one row.

What one row of a shape showed holds for all others, until looking finds too many that are otherwise: then the shape is
forgotten, and its rows are masked by their characters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from eulerforge.data.landmarks import Landmarks, SpecialPlaces, learn
from eulerforge.data.render import ANSWER_LAST, WHOLE, Rendered

_MOST_MISSED = 0.2


class ShapeMasks:
    """The landmarks of each shape that was met; ``special`` are the ids of special tokens."""

    def __init__(self, special: Collection[int]) -> None:
        self._special = special
        self._is_special = np.zeros(max(special, default=0) + 2, dtype=np.bool_)
        self._is_special[list(special)] = True
        # None: of no use, or forgotten
        self._known: dict[int, Landmarks | None] = {}

    def knows(self, shape: int) -> bool:
        """Whether the mask of a row of this shape can be told without its characters."""
        return shape < 0 or self._known.get(shape) is not None

    def learn(self, shape: int, ids: Sequence[int], ranges: Sequence[tuple[int, int]]) -> None:
        """Take a row's ids and trained ranges for those of its shape, if it is the first one."""
        if shape > 0 and shape not in self._known:
            self._known[shape] = learn(ids, ranges, self._special)

    def forget(self) -> None:
        """Look at the characters of all rows of the shapes known so far."""
        self._known = dict.fromkeys(self._known)

    def masked(
        self,
        rendered: Sequence[Rendered],
        fast: Sequence[bool],
        answers: Mapping[int, int],
        tokens: npt.NDArray[np.uint32],
        offsets: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[np.uint8], list[int]]:
        """The mask of all rows whose shape is known, and the rows of these that are not as their shape says.

        ``answers`` has the tokens of the answer of each row whose shape is ANSWER_LAST, where there is a border.
        """
        borders = np.zeros(len(tokens) + 1, dtype=np.int8)
        missed: list[int] = []
        groups: dict[int, list[int]] = {}
        for place, (row, known) in enumerate(zip(rendered, fast, strict=True)):
            if known:
                groups.setdefault(row.shape, []).append(place)
        special: SpecialPlaces | None = None
        for shape, group in groups.items():
            rows = np.array(group, dtype=np.int64)
            if shape == WHOLE:
                spans = [np.stack([offsets[rows], offsets[rows + 1]], axis=1)]
            elif shape == ANSWER_LAST:
                rows = np.array([place for place in group if place in answers], dtype=np.int64)
                counts = np.array([answers[place] for place in rows.tolist()], dtype=np.int64)
                spans = [np.stack([offsets[rows + 1] - counts, offsets[rows + 1]], axis=1)]
            else:
                landmarks = self._known[shape]
                if landmarks is None:  # forgotten since the rows were encoded
                    missed += group
                    continue
                special = special or SpecialPlaces.of(tokens, offsets, self._is_special)
                found, spans = special.spans(landmarks, rows, offsets)
                lost = rows[~found].tolist()
                missed += lost
                if len(lost) > _MOST_MISSED * len(group):
                    self._known[shape] = None  # looking costs more than it saves
                spans = [span[found] for span in spans]
            for span in spans:
                np.add.at(borders, span[:, 0], 1)
                np.add.at(borders, span[:, 1], -1)
        labelled = np.cumsum(borders[:-1], dtype=np.int8).view(np.uint8)
        labelled[offsets[:-1][np.diff(offsets) > 0]] = 0  # nothing stands before the first token
        return labelled, missed
