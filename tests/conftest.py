"""Shared by all tests: a cache of their own, the CPU's threads kept low, and the tests' folder importable."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# threads that wait for each other spin: a test of small tensors takes up to ten times as long beside other work
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a run of the whole suite notes which error sites are reached, and fails for those that no test has reached
from sitewatch import pytest_collection_finish, pytest_sessionfinish, pytest_terminal_summary  # noqa: F401

# distributions of their own, whose tests need them installed: tests/integration/test_plugins_new.py runs them
collect_ignore_glob = ["thirdparty/*"]


# a script that starts the tests in the background lets them ignore SIGINT, and nohup SIGHUP; the tests of stops need
# both as a shell has them
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EULERFORGE_CACHE", str(tmp_path_factory.getbasetemp() / "eulerforge-cache"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
