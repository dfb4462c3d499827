"""How many compiled kernels oneDNN keeps, set before torch is imported.

Notable: oneDNN compiles a bf16 matrix product for every shape that it meets and keeps the last 1024 of them, and torch
keeps as many of its own; each may hold most of a MiB. Documents of many lengths give new shapes in every step, so a
run's memory would grow for hundreds of steps. A micro-batch of a dozen documents meets some 120 shapes in every layer;
with 64 kept, all were compiled again in the next layer, which took 8% of a step.
"""

from __future__ import annotations

import os

KEPT = 192
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's own, and that of the layer between torch and oneDNN."""


def bound_kernel_caches() -> None:
    """Set what the environment does not say already; without effect on a torch that has computed something."""
    for name in VARIABLES:
        os.environ.setdefault(name, str(KEPT))
