"""SIGINT, SIGTERM and SIGHUP end a command as Ctrl-C does in Python: by an exception, so that all is put away.

``training.signals`` takes over while a run trains; until then, and in every other command, these handlers are in place.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from eulerforge.errors import EulerForgeError, Interrupted

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stops:
    """A handler for all three; ``number`` is the first signal that came, or None."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            raise Interrupted(number)
        # more of them must not disturb the putting away, but who presses Ctrl-C again wants the end now
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def stops_raise() -> Iterator[None]:
    """Inside, a signal raises Interrupted, once; a signal that whoever started us ignores (nohup) stays ignored.

    Raises:
        Interrupted: a signal came. A library that was being imported may have made another error of it, as C code does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    stops = Stops()
    old = {number: signal.getsignal(number) for number in CAUGHT}
    for number, handler in old.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stops)
    try:
        yield
    except EulerForgeError:
        raise
    except Exception as error:
        if stops.number is not None:
            raise Interrupted(stops.number) from error
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
