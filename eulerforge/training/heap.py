"""What the C library's heap holds of freed memory at the peak of a run on the CPU.

Notable: glibc cannot give an aligned block's place to one of the same size, which leaves holes. That share is the one
number of the estimate that is not counted: it was fitted to the first twelve cells of ``benchmarks/estimate_grid.py``,
with glibc 2.36, and again to the same cells with large tensors at the border of a page (``training/bigblocks.py``).
"""

from __future__ import annotations

import attrs
import torch

from eulerforge.training.bigblocks import big_blocks_are_aligned
from eulerforge.training.limits import is_glibc
from eulerforge.training.peak import StepPeak


@attrs.frozen
class Holes:
    """What glibc's heap holds of freed memory, as shares: beside the blocks that are kept, in half precision and in
    fp32, and of those that come and go while one layer is computed, below ``HEAP_BLOCK`` and from there on."""

    of_kept_half: float
    of_kept_fp32: float
    of_small: float
    of_large: float


HOLES = Holes(0.42, 0.88, 1.8, 0.4)
HOLES_BETWEEN_PAGES = Holes(0.51, 0.22, 1.34, 0.18)


def heap_bytes(kept: int, step: StepPeak, dtype: torch.dtype) -> int:
    """Freed bytes that the heap holds, beside ``kept`` (activations, gradients, optimizer) and the workspace."""
    if not is_glibc():
        return 0
    holes = HOLES_BETWEEN_PAGES if big_blocks_are_aligned() else HOLES
    of_kept = holes.of_kept_fp32 if dtype == torch.float32 else holes.of_kept_half
    return int(of_kept * kept + holes.of_small * step.small + holes.of_large * (step.workspace - step.small))
