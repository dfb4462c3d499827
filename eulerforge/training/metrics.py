"""metrics.jsonl: one JSON object per optimizer step and per validation, in the order in which they happened.

What is not finite is null there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from eulerforge.config.atomic import write_all, write_text_atomic
from eulerforge.errors import RunError
from eulerforge.terminal import strict

FILE_NAME = "metrics.jsonl"


class RowLog(Protocol):
    """What the loop needs of a log."""

    def write(self, row: dict[str, Any]) -> None:
        """Take a row."""

    def sync(self) -> None:
        """Make what was taken last."""


class MetricsLog:
    """Appends rows; opened at step N, it first drops the rows of later steps, which will be trained again.

    With ``measured_again`` the held-out loss of step N goes too; ``say`` hears of damaged lines, which go as well.
    Every method raises RunError when the disk is full or not writable.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int = 0,
        measured_again: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.path = folder / FILE_NAME
        kept = [row for row in read_metrics(folder, say=say) if row["step"] <= step] if step else []
        if measured_again:
            kept = [row for row in kept if row["step"] < step or "held_out_loss" not in row]
        with self._faults():
            write_text_atomic(self.path, "".join(_line(row) for row in kept))
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def write(self, row: dict[str, Any]) -> None:
        with self._faults():
            write_all(self._descriptor, _line(row).encode())

    def sync(self) -> None:
        """Flush to the disk, so that a checkpoint never knows more steps than this file."""
        with self._faults():
            os.fsync(self._descriptor)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.path} could not be written: {error.strerror or error}",
                hint="make room, then go on with --resume; earlier checkpoints are untouched",
            ) from error

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(strict(row), allow_nan=False) + "\n"


def read_metrics(folder: Path, *, say: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """The rows of a run folder; damaged lines are left out and said.

    Nothing is said of a last line that a power failure cut short.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return []
    rows, bad = [], []
    *whole, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate([*whole, last] if last else whole, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        elif number <= len(whole):
            bad.append(number)
    if bad and say is not None:
        say(f"warning: {path} line {bad[0]} is damaged, {len(bad):,} in all: such rows are left out")
    return rows
