"""Files and folders that are complete or invisible.

Everything is written beside its destination, flushed to the disk, and then appears through one rename; a machine that
loses power in between leaves at most a folder whose name starts with ``.staging-``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STAGING_PREFIX = ".staging-"
_EXISTS = (errno.EEXIST, errno.ENOTEMPTY)  # what a rename onto a filled folder gives


def sha256_of(path: Path) -> str:
    """The content hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flush one file's content, or one folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step; a reader sees the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=STAGING_PREFIX, dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it readable for the owner only
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """``write_text_atomic`` of readable JSON."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def staged_folder(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """A fresh folder beside ``final`` that becomes ``final`` when the block ends well, and vanishes when it raises.

    Args:
        replace: ``final`` may exist already; it is put away first and deleted afterwards.

    Raises:
        FileExistsError: ``final`` exists and ``replace`` is False.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{STAGING_PREFIX}{final.name}-", dir=final.parent))
    staging.chmod(0o777 & ~_umask())
    try:
        yield staging
        _flush_tree(staging)
        if replace and final.exists():
            old = Path(tempfile.mkdtemp(prefix=f"{STAGING_PREFIX}old-", dir=final.parent))
            final.rename(old / final.name)
            staging.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            _rename_new(staging, final)
        fsync_path(final.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def commit_folder(staging: Path, final: Path) -> None:
    """Make a filled folder on the same filesystem appear as ``final``; the first of several writers wins."""
    _flush_tree(staging)
    try:
        _rename_new(staging, final)
    except FileExistsError:
        shutil.rmtree(staging, ignore_errors=True)
    fsync_path(final.parent)


def remove_leftovers(folder: Path) -> list[str]:
    """Delete what an interrupted write left in ``folder``; give back the names. Only for the folder's sole writer."""
    names = []
    for path in sorted(folder.glob(f"{STAGING_PREFIX}*")):
        names.append(path.name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return names


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
