"""Files and folders that are complete or invisible.

Everything is written beside its destination, flushed to the disk, and then appears through one rename; a machine that
loses power in between leaves at most a folder whose name starts with ``.staging-``.
A folder that is replaced changes places with the new one in one step, where the file system can do that; elsewhere the
old one has the name ``.replaced-<name>`` for a moment, and whoever writes next puts it back.
Bytes go through ``os.write`` and names through ``os.rename``, so that a test can die at each of them.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eulerforge.config.claims import LOCK_SUFFIX, abandoned, claimed
from eulerforge.terminal import strict

STAGING_PREFIX = ".staging-"
REPLACED_PREFIX = ".replaced-"
_RENAME_EXCHANGE = 2  # of renameat2(2)
_AT_FDCWD = -100
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_WRITE_BYTES = 64 << 20
_CLOCK_TICK_NS = 2_000_000_000  # longer than the clock of any file system stands still
_EXISTS = (errno.EEXIST, errno.ENOTEMPTY)  # what a rename onto a filled folder gives


def sha256_of(path: Path) -> str:
    """The content hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_state(path: Path) -> tuple[int, ...]:
    """What changes when a file does: device, inode, size, and when content and entry were last changed, in ns.

    A file that was changed just now has a state that equals no other one: the next change may bear the same time.

    Raises:
        OSError: it is not there.
    """
    found = path.stat()
    state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return state if time.time_ns() - found.st_ctime_ns > _CLOCK_TICK_NS else (*state, time.monotonic_ns())


def fsync_path(path: Path) -> None:
    """Flush one file's content, or one folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data``, however little the system takes at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view[:_WRITE_BYTES]) :]


def write_file(path: Path, data: bytes) -> None:
    """Write a new file; not flushed, which is for whoever commits the folder to do."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(descriptor, data)
    finally:
        os.close(descriptor)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step; a reader sees the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=STAGING_PREFIX, dir=path.parent)
    temporary = Path(name)
    try:
        try:
            write_all(descriptor, text.encode("utf-8"))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it readable for the owner only
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """``write_text_atomic`` of readable JSON; null for what is not finite."""
    write_text_atomic(path, json.dumps(strict(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def staged_folder(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """A fresh folder beside ``final`` that becomes ``final`` when the block ends well, and vanishes when it raises.

    Args:
        replace: ``final`` may exist already; it is there until the new one is, and deleted afterwards.

    Raises:
        FileExistsError: ``final`` exists and ``replace`` is False.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    if replace:
        _put_back(final)
    with claimed(final.parent, f"{STAGING_PREFIX}{final.name}-") as staging:
        staging.mkdir()
        try:
            yield staging
            _flush_tree(staging)
            if replace and final.exists():
                _replace(staging, final)
            else:
                _rename_new(staging, final)
            fsync_path(final.parent)
        finally:
            remove_tree(staging, ignore_errors=True)


def commit_folder(staging: Path, final: Path) -> None:
    """Make a filled folder on the same filesystem appear as ``final``; the first of several writers wins."""
    _flush_tree(staging)
    try:
        _rename_new(staging, final)
    except FileExistsError:
        shutil.rmtree(staging, ignore_errors=True)
    fsync_path(final.parent)


def remove_tree(path: Path, *, ignore_errors: bool = False) -> None:
    """Delete a folder and all in it; of a link only the link, never what it leads to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=ignore_errors)


def remove_leftovers(folder: Path, *, of: str | None = None) -> list[str]:
    """Delete what an interrupted write left in ``folder``; give back the names. A staging folder in use is left alone.

    Args:
        of: the name that was to appear, for who writes beside others; None is for the folder's sole writer, who may
            also delete what never had a lock.
    """
    pattern = "*" if of is None else f"{glob.escape(of)}-*{LOCK_SUFFIX}"
    names = []
    for name in sorted({path.name.removesuffix(LOCK_SUFFIX) for path in folder.glob(f"{STAGING_PREFIX}{pattern}")}):
        path = folder / name
        with abandoned(path) as free:
            if free and os.path.lexists(path):
                names.append(name)
                remove_tree(path) if path.is_dir() else path.unlink()
    return names


def put_back_replaced(folder: Path) -> list[str]:
    """Give folders their names back that an interrupted replacement hid; give back those names.

    Only for the folder's sole writer.
    """
    finals = [path.with_name(path.name.removeprefix(REPLACED_PREFIX)) for path in folder.glob(f"{REPLACED_PREFIX}*")]
    return [final.name for final in sorted(finals) if _put_back(final)]


def exchange(one: Path, other: Path) -> bool:
    """Let two names of one file system change places in one step; False where the system cannot."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux, or an old C library
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _replace(staging: Path, final: Path) -> None:
    """Put ``staging`` in the place of ``final``; what was ``final`` is deleted, now or with the staging folder."""
    if exchange(staging, final):
        return
    hidden = final.with_name(f"{REPLACED_PREFIX}{final.name}")
    final.rename(hidden)
    staging.rename(final)
    fsync_path(final.parent)
    remove_tree(hidden, ignore_errors=True)


def _put_back(final: Path) -> bool:
    """Undo or finish a replacement that was interrupted; True when ``final`` has come back by it."""
    hidden = final.with_name(f"{REPLACED_PREFIX}{final.name}")
    if not hidden.is_dir():
        return False
    if final.exists():
        remove_tree(hidden)
        return False
    hidden.rename(final)
    return True


def _rename_new(staging: Path, final: Path) -> None:
    try:
        if final.exists():
            raise FileExistsError(f"{final} exists already")
        staging.rename(final)
    except OSError as error:
        if error.errno in _EXISTS:
            raise FileExistsError(f"{final} exists already") from error
        raise


def _flush_tree(folder: Path) -> None:
    for directory, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_path(Path(directory) / name)
        fsync_path(Path(directory))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
