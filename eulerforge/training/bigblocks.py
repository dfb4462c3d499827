"""Large tensors at the border of a page, in the runs whose memory that makes less; set before torch is imported.

Notable: where glibc cuts an aligned block out of a free one, it keeps the slivers in front and behind for small
objects, so the place can hold no block of that size again, and the heap grows to twice what is alive. At the border of
a page most of what is cut off is too large for that, and grows together with the block again. Measured on the CPU with
glibc 2.36 (the docs' page on memory): 10 to 24% less where all layers are computed again, no slower in bf16, or in
fp32, whose speed was not measured; but up to 10% more, and 2 to 4% slower, in bf16 with nothing computed again.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from eulerforge.models.processor import multiplies_fp32

if TYPE_CHECKING:
    from eulerforge.config.schema import RunConfig

VARIABLE = "THP_MEM_ALLOC_ENABLE"
"""torch's own switch, for tensors from 2 MiB on; it asks for huge pages too, and does nothing but on Linux."""


def align_big_blocks(run: RunConfig) -> None:
    """Set the switch for a run that gains, unless the environment says it; without effect once torch has a tensor."""
    if run.training.gradient_checkpointing != "off" or multiplies_fp32(run.model.load_precision):
        os.environ.setdefault(VARIABLE, "1")


def big_blocks_are_aligned() -> bool:
    """Whether torch was told so."""
    return os.environ.get(VARIABLE) == "1"
