"""Output that cannot stop a run: a terminal that was closed, a reader that went away, a full disk under a log.

Notable: after the first failure the descriptor itself leads nowhere, so that libraries which write to it, and the
interpreter's last flush, do no harm either.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Unbreakable:
    """A text stream whose ``write`` and ``flush`` never raise; all else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except UnicodeEncodeError:  # a ValueError too, of a stream that works
            encoding = self._stream.encoding
            return int(self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding)))
        except (OSError, ValueError):  # ValueError: the stream object itself is closed
            self._lead_nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._lead_nowhere()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lead_nowhere(self) -> None:
        try:
            lead_nowhere(self._stream.fileno())
            self._stream.flush()
        except (OSError, ValueError):
            pass  # it has no descriptor, or is closed: there is nothing left that could fail


def lead_nowhere(descriptor: int) -> None:
    """Let what is written to ``descriptor`` vanish from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextmanager
def unbreakable_output() -> Iterator[None]:
    """stdout and stderr are ``Unbreakable`` inside."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def open_standard_streams() -> None:
    """Fill the places of stdin, stdout and stderr that the caller closed.

    Without this the next file that is opened, a checkpoint perhaps, would get the place and be written into.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it takes the lowest free place, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
