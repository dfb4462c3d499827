"""What the C library's heap holds of freed memory at the peak of a run on the CPU.

Notable: glibc cannot give an aligned block's place to one of the same size, which leaves holes. That share is the one
number of the estimate that is not counted: it was measured in ``benchmarks/estimate_grid.py``.
"""

from __future__ import annotations

import torch

from eulerforge.training.limits import is_glibc
from eulerforge.training.peak import StepPeak

HEAP_OF_KEPT = {False: 0.42, True: 0.88}
"""glibc: what its heap holds beside the blocks that are kept, as a share of them, in half precision and in fp32.
Measured, not derived: ``benchmarks/estimate_grid.py``."""
HEAP_OF_SMALL, HEAP_OF_LARGE = 1.8, 0.4
"""As above, of the blocks that come and go while one layer is computed, below ``HEAP_BLOCK`` and from there on."""


def heap_bytes(kept: int, step: StepPeak, dtype: torch.dtype) -> int:
    """Freed bytes that the heap holds, beside ``kept`` (activations, gradients, optimizer) and the workspace."""
    if not is_glibc():
        return 0
    of_workspace = HEAP_OF_SMALL * step.small + HEAP_OF_LARGE * (step.workspace - step.small)
    return int(HEAP_OF_KEPT[dtype == torch.float32] * kept + of_workspace)
