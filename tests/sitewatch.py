"""While the whole suite runs, note which error sites are reached; at its end, fail for those that no test has reached.

``tests/conftest.py`` takes the hooks of this module over. A run of a part of the suite is not watched.
What is noted is where in our sources an error, or what becomes one, was being made: the innermost frames of the call.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from errorsites import ROOT, Site, sites
from unreachedsites import UNREACHED

CLASSES = (
    "eulerforge.errors:Problem",  # every EulerForgeError makes one
    "eulerforge.errors:Interrupted",
    "eulerforge.plugins.isolation:PluginFailure",
    "eulerforge.data.turns:BadRow",
    "eulerforge.data.chat_template:NotAPrefixError",
    "eulerforge.config.leaves:WrongTypeError",
    "eulerforge.models.streamed:Halted",
)
DEPTH = 8
"""Frames between the making of an error and the ``raise`` of the function that asked for it."""


@attrs.define
class Watch:
    """``lines`` are the files and lines that were making an error."""

    lines: set[tuple[str, int]] = attrs.field(factory=set)

    def install(self) -> None:
        """Wrap the constructors, for the rest of the process."""
        for target in CLASSES:
            module, _, name = target.partition(":")
            kind = getattr(importlib.import_module(module), name)
            kind.__init__ = self._noting(kind.__init__)

    def _noting(self, original: Callable[..., None]) -> Callable[..., None]:
        def init(made: Any, *args: Any, **kwargs: Any) -> None:
            original(made, *args, **kwargs)
            self.note()

        return init

    def note(self) -> None:
        frame, own, depth = sys._getframe(2), str(ROOT), 0
        while frame is not None and depth < DEPTH:
            path = frame.f_code.co_filename
            if path.startswith(own) and not path.endswith("<attrs generated init>"):
                self.lines.add((path, frame.f_lineno))
            frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]

    def reached(self, site: Site) -> bool:
        path = str(site.path)
        return any((path, line) in self.lines for line in range(site.start, site.end + 1))


def expected() -> list[Site]:
    """The sites whose making can be seen: an error of ours, or a raise of what a function of ours has made."""
    return [site for site in sites() if not site.builtin]


def is_whole(config: pytest.Config) -> bool:
    """Whether this session runs all tests: no path, keyword, marker or stop was asked for."""
    chosen = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "maxfail", "collectonly")
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not any(
        config.getoption(name, None) for name in chosen
    )


WATCH = pytest.StashKey[Watch]()
MISSED = pytest.StashKey[list[Site]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    if is_whole(session.config):
        watch = session.config.stash[WATCH] = Watch()
        watch.install()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    watch = session.config.stash.get(WATCH, None)
    if watch is None or exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return
    missed = [site for site in expected() if site.key not in UNREACHED and not watch.reached(site)]
    session.config.stash[MISSED] = missed
    if missed:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    watch, missed = config.stash.get(WATCH, None), config.stash.get(MISSED, None)
    if watch is None or missed is None:
        return
    terminalreporter.section("error sites")
    reached = [site for site in expected() if watch.reached(site)]
    terminalreporter.write_line(f"{len(reached)} of {len(expected())} error sites were reached by some test")
    for key in sorted({site.key for site in reached} & UNREACHED.keys()):
        terminalreporter.write_line(f"take it out of tests/unreachedsites.py, it is reached: {key}")
    for site in missed:
        terminalreporter.write_line(
            f"{site.file}:{site.start}: no test reaches it: test it, or give a reason in tests/unreachedsites.py"
            f" for {site.key}",
            red=True,
        )
