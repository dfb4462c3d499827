"""Who is still writing: a lock beside each staging folder tells a live writer's from what a killed one left.

A process id in the name would not do, because a container counts its own. The lock is a file beside the folder, which
is renamed while it is held; it is there before the folder and goes after it, so that a folder without one is nobody's.
The system lets go of a lock when its process dies, however it died.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_SUFFIX = ".lock"


@contextmanager
def claimed(folder: Path, prefix: str) -> Iterator[Path]:
    """A free name in ``folder`` that begins with ``prefix``, ours until the block ends."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=LOCK_SUFFIX, dir=folder)
        with contextlib.suppress(OSError):  # a file system without locks: there nobody is taken for dead
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        lock = Path(name)
        if lock.exists():
            break
        os.close(descriptor)  # someone swept the file before it was locked
    try:
        yield lock.with_suffix("")
    finally:
        with contextlib.suppress(OSError):  # a disk that fails here has failed in the block before
            lock.unlink()
        os.close(descriptor)


@contextmanager
def abandoned(path: Path) -> Iterator[bool]:
    """Whether nobody alive has claimed this name; then it is ours inside the block, and its lock goes at the end."""
    lock = Path(f"{path}{LOCK_SUFFIX}")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield True
        return
    except OSError:  # another user's, or a link: who made it cannot be asked
        yield False
        return
    try:
        free = _taken(descriptor)
        yield free
        if free:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
