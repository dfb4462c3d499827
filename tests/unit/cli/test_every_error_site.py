"""The walk over all places where our sources make an error: each says what is wrong, and how to mend it.

What the sources cannot show, the whole suite does: ``tests/sitewatch.py`` sees which sites some test has reached.
"""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import errorsites
import pytest
import sitewatch
from errorsites import ROOT, Site, argument, sites, texts
from unreachedsites import UNREACHED

from eulerforge import errors
from eulerforge.cli.main import main
from eulerforge.errors import EulerForgeError

MAKERS = errorsites.error_classes() | {"Problem"}

WITHOUT_A_HINT = {
    "eulerforge/cli/output.py::warn::Problem::text": "a warning made of a text that holds its own way out",
    "eulerforge/data/read.py::BadRows.error::DataError::shown": "each row's problem has its own",
}
"""Calls that give no hint, and why they may."""

SPEC = "a plugin's spec is wrong: plugins.isolation catches it, and it is a row of plugins list"
RANK = "the strategy's settings refuse a rank below 1 with the preset's line"
BARE = {
    "eulerforge/api/specs.py::_check_inside": SPEC,
    "eulerforge/api/specs.py::_check_name": SPEC,
    "eulerforge/api/specs.py::_check_target": SPEC,
    "eulerforge/api/specs.py::_names": SPEC,
    "eulerforge/api/version.py::parse": "caught in plugins.loading, where it becomes Incompatible",
    "eulerforge/plugins/loading.py::check_api": "caught a few lines below, where it becomes Incompatible",
    "eulerforge/plugins/registry.py::Registry.load_target": "a caller's bug: no command asks for a preset's",
    "eulerforge/plugins/registry.py::Registry.owner": "a caller's bug: all specs come from the registry",
    "eulerforge/cli/numbers.py::at_least.whole_number": "argparse turns it into a usage error",
    "eulerforge/cli/replay_command.py::_count": "argparse turns it into a usage error",
    "eulerforge/config/atomic.py::_rename_new": "plugins new names the folder; commit_folder lets it be",
    "eulerforge/config/atomic.py::exchange": "an OSError with both names, as any system call's",
    "eulerforge/data/batches.py::BatchPlan.__init__": "no row left is a DataError before a plan is made",
    "eulerforge/data/cache.py::_npy_header": "caught there: the cache is made anew",
    "eulerforge/lora/linear.py::LoRALinear.__init__": RANK,
    "eulerforge/lora/experts.py::LoRAExperts.__init__": RANK,
}
"""Functions that raise a builtin error, and why no user sees it bare."""


def made() -> list[Site]:
    return [site for site in sites() if site.kind in MAKERS]


def hint_of(site: Site) -> ast.expr | None:
    assert site.call is not None
    return argument(site.call, "hint")


def never_empty(hint: ast.expr | None) -> bool:
    """Whether a hint is sure to hold text: a branch that gives nothing must have another one behind ``or``."""
    if isinstance(hint, ast.Constant):
        return isinstance(hint.value, str) and bool(hint.value.strip())
    if isinstance(hint, ast.IfExp):
        return never_empty(hint.body) and never_empty(hint.orelse)
    if isinstance(hint, ast.BoolOp):
        return never_empty(hint.values[-1])
    return hint is not None


def test_the_walk_sees_the_sources() -> None:
    """No test that cannot fail: the inventory is as large as the sources are."""
    assert len(made()) > 200
    assert len({site.path for site in made()}) > 40
    assert {site.kind for site in made()} >= set(errorsites.error_classes()) - {"EulerForgeError"}
    assert not [site.key for site in sites() if re.search(r":\d+:", site.key)]


def test_every_error_has_a_hint() -> None:
    without = [site for site in made() if not never_empty(hint_of(site)) and not carries_others(site)]
    assert [str(site) for site in without if site.key not in WITHOUT_A_HINT] == []


def carries_others(site: Site) -> bool:
    """``SomeError.of(problems)``: the problems have the hints."""
    return site.call is not None and isinstance(site.call.func, ast.Attribute) and site.call.func.attr == "of"


def test_every_message_is_written_as_one_line() -> None:
    several = [
        str(site)
        for site in sites()
        if site.call is not None
        and any("\n" in text for text in texts(site.call))
        and "splitlines" not in ast.unparse(site.call)
    ]
    assert several == []


def test_no_error_of_pythons_own_reaches_a_user_bare() -> None:
    """A builtin error says neither how to mend it nor which exit code it has: each module that raises one is known."""
    found = {f"{site.file}::{site.function}" for site in sites() if site.raised and site.builtin}
    assert found == BARE.keys()


def test_every_class_has_a_row_with_its_code_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "exit_codes_and_json.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d, ]+) \|", page, re.MULTILINE))
    classes = {name: getattr(errors, name) for name in errorsites.error_classes()}
    assert rows.keys() == classes.keys() - {"EulerForgeError"}
    for name, codes in rows.items():
        said = {int(code) for code in codes.split(",")}
        kind = classes[name]
        stopped = kind is errors.Stopped
        assert said == (
            {kind("", signal_number=number).exit_code for number in (1, 2, 15)} if stopped else {kind.exit_code}
        )


def test_no_exempted_key_outlives_its_site() -> None:
    assert (WITHOUT_A_HINT.keys() | UNREACHED.keys()) - {site.key for site in sites()} == set()


def test_every_unreached_site_has_its_reason() -> None:
    assert all(len(reason.split()) >= 4 for reason in UNREACHED.values())


def test_the_watch_sees_who_made_an_error_and_fails_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for target in sitewatch.CLASSES:
        module, _, name = target.partition(":")
        kind = getattr(importlib.import_module(module), name)
        monkeypatch.setattr(kind, "__init__", kind.__init__)  # put back afterwards
    watch = sitewatch.Watch()
    watch.install()
    assert main(["frobnicate"]) == 2
    reached = {site.key for site in sitewatch.expected() if watch.reached(site)}
    assert reached == {
        "eulerforge/cli/main.py::_dispatch::UsageError::there is no command {}",
        "eulerforge/errors.py::EulerForgeError.__init__::Problem::message",
    }
    config = SimpleNamespace(stash={sitewatch.WATCH: watch})
    session = SimpleNamespace(config=config, exitstatus=pytest.ExitCode.OK)
    sitewatch.pytest_sessionfinish(session, session.exitstatus)
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED
    assert {site.key for site in config.stash[sitewatch.MISSED]} == (
        {site.key for site in sitewatch.expected()} - reached - UNREACHED.keys()
    )


@pytest.mark.parametrize("name", sorted(errorsites.error_classes()))
def test_every_class_is_defined_in_one_room(name: str) -> None:
    assert issubclass(getattr(errors, name), EulerForgeError)
    assert Path(errors.__file__).name == "errors.py"
