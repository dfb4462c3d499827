"""SIGINT, SIGTERM and SIGHUP ask for a stop at the next step's edge; a second SIGINT stops at once.

An evaluation or a sample that is under way is given up: it can be made again, and a scheduler's grace period is short.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """While entered, ``number`` is the signal that asked for a stop, or None."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._old: dict[int, Any] = {}

    def wanted(self) -> bool:
        """Whether a stop was asked for."""
        return self.number is not None

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread only; elsewhere (a notebook's worker) the defaults stay
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.getsignal(number) for number in _CAUGHT}
            for number, handler in self._old.items():
                if handler != signal.SIG_IGN:  # nohup and the like: whoever started us wants the run to outlive it
                    signal.signal(number, self._handle)
                # a stop that came before, and that some library's code has swallowed
                self.number = self.number or getattr(handler, "number", None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number is not None:
            raise KeyboardInterrupt
        self.number = number
