"""Python's garbage collector during the imports of a start."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected_imports() -> Iterator[None]:
    """Import without the collector, and keep what was imported out of its sight.

    torch and transformers are a million objects that live as long as the process; the collector would walk over them
    again and again, during the imports and after them, which is a quarter of the time to the first step.
    Where torch is imported already, the process is somebody else's, and nothing is changed.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
