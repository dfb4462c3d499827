"""How much slower this machine is than the one that bounds on CPU seconds were set on."""

from __future__ import annotations

import os
import subprocess
import sys

SINGLE = {**os.environ, "OMP_NUM_THREADS": "1"}
SINGLE.pop("PYTHONDONTWRITEBYTECODE", None)  # a second start finds our modules compiled, as an installed one
BARE = "import torch, transformers, time; print(time.process_time())"
BARE_CPU_SECONDS = 1.1
"""What the imports alone take on the machine that the bounds were met on."""


def bare_cpu_seconds() -> float:
    """CPU seconds of a process that imports torch and transformers, on one thread."""
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, env=SINGLE, check=True)
    return float(done.stdout)


def slower(bare: float) -> float:
    """By what a bound is multiplied where the imports take ``bare`` CPU seconds; never below 1."""
    return max(1.0, bare / BARE_CPU_SECONDS)
