"""What the C library's heap holds of freed memory at the peak of a run on the CPU.

Notable: glibc cannot give an aligned block's place to one of the same size, which leaves holes. Their shares are
the only numbers of the estimate that are not counted: they were fitted to runs of ``benchmarks/estimate_grid.py`` with
glibc 2.36, with and without large tensors at the border of a page (``training/bigblocks.py``).
"""

from __future__ import annotations

import attrs

from eulerforge.models.room import is_glibc
from eulerforge.training.bigblocks import big_blocks_are_aligned
from eulerforge.training.peak import StepPeak


@attrs.frozen
class Holes:
    """What glibc's heap holds of freed memory: shares of the blocks that are kept, and of those that come and go while
    one layer is computed, below ``HEAP_BLOCK`` and from there on; and bytes for each layer, whose passes leave small
    objects between the blocks."""

    of_kept: float
    of_small: float
    of_large: float
    of_a_layer: int


HOLES = Holes(0.4, 1.9, 0.9, 0)
HOLES_BETWEEN_PAGES = Holes(0.45, 0.75, 0.15, 11 << 20)


def heap_bytes(kept: int, step: StepPeak, layers: int) -> int:
    """Freed bytes that the heap holds, beside ``kept`` (activations, gradients, optimizer) and the workspace."""
    if not is_glibc():
        return 0
    holes = HOLES_BETWEEN_PAGES if big_blocks_are_aligned() else HOLES
    passing = holes.of_small * step.small + holes.of_large * (step.workspace - step.small)
    return int(holes.of_kept * kept + passing) + holes.of_a_layer * layers
