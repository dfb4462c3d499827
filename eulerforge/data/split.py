"""Which rows are held out: chosen by seed alone, disjoint from what is trained, in file order on both sides."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eulerforge.errors import DataError

Indices = npt.NDArray[np.int64]


def split_rows(rows: int, *, size: int | None, fraction: float | None, seed: int) -> tuple[Indices, Indices]:
    """(training, validation) indices of ``rows`` rows; none are held out when neither size nor fraction is given.

    A fraction is rounded to whole rows. Raises DataError when a side would be empty.
    """
    everything = np.arange(rows, dtype=np.int64)
    if size is not None:
        key, held_out = "data.validation.size", size
    elif fraction is not None:
        key, held_out = "data.validation.fraction", round(rows * fraction)
    else:
        return everything, everything[:0]
    if held_out < 1:
        raise DataError(
            f"nothing is left to validate on: {rows:,} usable rows", key=key, hint="raise it, or leave it out"
        )
    if held_out >= rows:
        raise DataError(
            f"nothing is left to train on: {held_out:,} of {rows:,} usable rows would be held out",
            key=key,
            hint="lower it",
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(rows)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
