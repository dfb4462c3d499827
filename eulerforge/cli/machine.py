"""Errors of Python's own that are the machine's and not ours: a file that may not be read, a full disk, no memory left.

A command words the ones it expects itself. What is here is for the places that nobody foresaw: it still names the path
and the reason, and never asks for a report of what the user can mend alone.
"""

from __future__ import annotations

import errno
import os

from eulerforge.errors import Problem

DEBUG = "--debug shows the place"
_SPACE = "free some space, or take a folder on another disk"
_HANDLES = "raise the limit (ulimit -n), or end what holds so many files"
_HINTS = {
    errno.ENOENT: "make it, or name another one; it may have been moved while the command ran",
    errno.ENOTDIR: "a part of the path is a file: name another folder",
    errno.EISDIR: "a file is wanted there: name another one",
    errno.EACCES: "give your user the right to it (ls -ld shows who has it), or take another folder",
    errno.EPERM: "give your user the right to it (ls -ld shows who has it), or take another folder",
    errno.EROFS: "that file system is mounted read-only: take another folder",
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: f"your quota is used up: {_SPACE}",
    errno.EFBIG: "the file system or ulimit -f allows no file of that size: take another folder",
    errno.EMFILE: _HANDLES,
    errno.ENFILE: _HANDLES,
    errno.ENAMETOOLONG: "take a shorter name",
    errno.ELOOP: "symbolic links lead in a circle there: name another path",
    errno.ENOMEM: "close other programs, or take a smaller model or a smaller batch",
    errno.EIO: "the disk or the network behind it failed: the system's log (dmesg) says more",
}


def machine_problem(error: Exception) -> Problem | None:
    """What to say of an error that the machine made; None when it may be a fault of the code."""
    if isinstance(error, OSError) and error.errno is not None:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        reason = os.strerror(error.errno) if error.errno in errno.errorcode else str(error.strerror)
        hint = _HINTS.get(error.errno, f"the operating system refused it; {DEBUG}")
        return Problem(message=": ".join([*([" and ".join(names)] if names else []), reason]), hint=hint)
    if isinstance(error, MemoryError):
        return Problem(message="the machine has no memory left", hint=_HINTS[errno.ENOMEM])
    if isinstance(error, RecursionError):
        return Problem(
            message="something is nested deeper than Python can follow",
            hint=f"look for deep nesting in the preset, the rows or the model's files; {DEBUG}",
        )
    if isinstance(error, UnicodeDecodeError):
        found = " ".join(f"{byte:02x}" for byte in error.object[error.start : error.end][:4])
        return Problem(
            message=f"a text is not {error.encoding}: byte {found} at offset {error.start}",
            hint=f"save the file as UTF-8; {DEBUG} that reads it",
        )
    if isinstance(error, UnicodeEncodeError):
        missing = ascii(error.object[error.start])
        return Problem(
            message=f"the output holds {missing}, which {error.encoding}, the encoding of your terminal, cannot say",
            hint="set PYTHONIOENCODING=utf-8, or a UTF-8 locale",
        )
    if isinstance(error, ImportError):
        return Problem(
            message=f"a package cannot be imported: {error.msg}",
            hint=f"install it anew in this environment; eulerforge env lists the versions; {DEBUG}",
        )
    return None
