"""A signal raises once, wherever the command is, and the handlers that were there before come back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from eulerforge.cli.stops import CAUGHT, stops_raise
from eulerforge.errors import Interrupted, UsageError
from eulerforge.training.signals import StopRequest


@pytest.fixture(autouse=True)
def _handlers() -> object:
    """As a shell starts a command: nothing is ignored, and Python's own handler waits for SIGINT."""
    before = {number: signal.getsignal(number) for number in CAUGHT}
    for number in CAUGHT:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", CAUGHT)
def test_a_signal_raises_and_the_handlers_come_back(number: signal.Signals) -> None:
    with pytest.raises(Interrupted) as raised, stops_raise():
        os.kill(os.getpid(), number)
    assert raised.value.number == number
    assert [signal.getsignal(one) for one in CAUGHT] == [signal.default_int_handler] * 3


def test_a_second_term_does_not_disturb_the_putting_away() -> None:
    away = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            away.append("all")

    with pytest.raises(Interrupted) as raised, stops_raise():
        work()
    assert (raised.value.number, away) == (signal.SIGTERM, ["all"])


def test_a_second_ctrl_c_ends_at_once() -> None:
    code = (
        "import os, signal\nfrom eulerforge.cli.stops import stops_raise\nwith stops_raise():\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally:\n        os.kill(os.getpid(), signal.SIGINT)\n        print('not reached')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (-signal.SIGINT, "", "")


def test_another_error_that_a_library_made_of_it_is_still_a_stop() -> None:
    def becomes(error: Exception) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise error from None

    with pytest.raises(Interrupted), stops_raise():
        becomes(ImportError("initialization failed"))
    with pytest.raises(UsageError), stops_raise():
        becomes(UsageError("worded where it was known", hint="wait"))
    with pytest.raises(ImportError), stops_raise():
        raise ImportError("no signal came")


def test_a_stop_that_a_library_swallowed_is_wanted_when_training_begins() -> None:
    with stops_raise():
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        with StopRequest() as stop:
            assert stop.number == signal.SIGTERM


def test_what_the_caller_ignores_stays_ignored() -> None:
    """``nohup`` ignores SIGHUP, a script's background job SIGINT: closing the terminal must not stop such a run."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stops_raise():
        os.kill(os.getpid(), signal.SIGHUP)
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_in_another_thread_it_changes_nothing() -> None:
    seen = []

    def work() -> None:
        with stops_raise():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
