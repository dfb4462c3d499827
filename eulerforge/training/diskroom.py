"""Room on the disk: asked for before a write begins, and one wording for a write that fails all the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from eulerforge.errors import RunError
from eulerforge.models.sizes import gib

SLACK_BYTES = 1 << 20
"""What a folder needs beside its tensors: headers, small files, blocks that are not full."""


@contextmanager
def room_for(folder: Path, needed: int, *, hint: str) -> Iterator[None]:
    """Refuse a write of ``folder`` that will not fit, and name the numbers when one fails.

    Raises:
        RunError: the disk is full or not writable.
    """
    needed += SLACK_BYTES
    numbers = f"{gib(needed)} ({needed:,} bytes) are needed"
    try:
        # the first folder above that is there: nothing is made for a write that is refused
        free = shutil.disk_usage(next(path for path in folder.absolute().parents if path.is_dir())).free
        if free < needed:
            raise RunError(f"{folder} was not written: {numbers} and {gib(free)} ({free:,} bytes) are free", hint=hint)
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder} could not be written: {error}; {numbers}", hint=hint) from error
