"""A disk that fails where a test says so: each write, flush, rename, creation and deletion below a folder is counted.

Functions of ``os`` are replaced, so this works for code that writes through them; what a compiled library writes is one
opaque step between two counted ones, and in a power failure all of it counts as not flushed. A flush is noted, not
made: what it promises is simulated here, and the real one takes most of the time of a tiny run.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KILLED = 137
SHORT = "short"
"""The system takes one byte of a write."""

DIE = "die"
"""The process is gone before the operation."""

TEAR = "tear"
"""The process is gone after half of a write; for what is not a write it is ``DIE``."""

BLACKOUT = "blackout"
"""Like ``TEAR``, and what was not flushed to the disk is lost with it."""

Fault = str | int | None
"""One of the words above, an errno to fail with, or None."""

Plan = Callable[[int, str, str], Fault]
"""(number of the operation, its name, path relative to the folder) -> what happens to it."""

_PATHS = ("rename", "replace", "mkdir", "unlink", "rmdir", "truncate")


class Disk:
    """What happens below ``root``; ``operations`` holds "name path" of each in order."""

    def __init__(self, root: Path, plan: Plan = lambda number, name, path: None) -> None:
        self.root = Path(os.path.realpath(root))
        self.plan = plan
        self.operations: list[str] = []
        self._flushed: dict[int, int] = {}
        self._real: dict[str, Any] = {}

    @contextmanager
    def watched(self) -> Iterator[Disk]:
        """The functions of ``os`` are ours inside."""
        from eulerforge.config import atomic

        self._real = {name: getattr(os, name) for name in (*_PATHS, "write", "fsync")}
        exchange = atomic.exchange
        for name in _PATHS:
            setattr(os, name, self._on_path(name))
        os.write, os.fsync = self._write, self._fsync
        atomic.exchange = self._exchange(exchange)
        try:
            yield self
        finally:
            for name, function in self._real.items():
                setattr(os, name, function)
            atomic.exchange = exchange

    def _on_path(self, name: str) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            # a rename is known by where it leads to
            shown = self._absolute(rest[0] if name in ("rename", "replace") else path, options.get("dir_fd"))
            # what finds nothing to do is no operation: making a folder that is there, deleting what is gone
            if os.path.lexists(shown) != (name == "mkdir") or name in ("rename", "replace"):
                self._meet(name, shown)
            return self._real[name](path, *rest, **options)

        return call

    def _exchange(self, real: Callable[[Path, Path], bool]) -> Callable[[Path, Path], bool]:
        def call(one: Path, other: Path) -> bool:
            self._meet("exchange", str(other))
            return real(one, other)

        return call

    def _write(self, descriptor: int, data: Any) -> int:
        path = self._path_of(descriptor)
        fault = self._meet("write", path, torn=lambda: self._real["write"](descriptor, bytes(data[: len(data) // 2])))
        return int(self._real["write"](descriptor, bytes(data[:1]) if fault == SHORT else data))

    def _fsync(self, descriptor: int) -> None:
        self._meet("fsync", self._path_of(descriptor))
        facts = os.fstat(descriptor)
        self._flushed[facts.st_ino] = facts.st_size

    def _meet(self, name: str, path: str, torn: Callable[[], Any] | None = None) -> Fault:
        """Count an operation and let happen to it what the plan says."""
        if not (path + "/").startswith(f"{self.root}/"):
            return None
        relative = os.path.relpath(path, self.root)
        self.operations.append(f"{name} {relative}")
        fault = self.plan(len(self.operations), name, relative)
        if fault in (DIE, TEAR, BLACKOUT):
            if torn is not None and fault != DIE:
                torn()
            if fault == BLACKOUT:
                self._lose_what_was_not_flushed()
            os._exit(KILLED)
        if isinstance(fault, int):
            raise OSError(fault, os.strerror(fault), path)
        return fault

    def _lose_what_was_not_flushed(self) -> None:
        for directory, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(directory, name)
                facts = os.stat(path)
                kept = self._flushed.get(facts.st_ino, facts.st_size // 2)
                if kept < facts.st_size:
                    self._real["truncate"](path, kept)

    @staticmethod
    def _path_of(descriptor: int) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            return ""

    def _absolute(self, path: Any, dir_fd: int | None) -> str:
        text = os.fsdecode(path)
        if dir_fd is not None:
            return os.path.join(self._path_of(dir_fd), text)
        return os.path.join(os.path.realpath(os.path.dirname(text) or "."), os.path.basename(text))


def full_from(number: int) -> Plan:
    """No room for a single byte from an operation on; deleting still works."""
    return lambda at, name, path: errno.ENOSPC if at >= number and name in ("write", "mkdir") else None


def once(number: int, fault: Fault) -> Plan:
    """One operation goes wrong."""
    return lambda at, name, path: fault if at == number else None
