"""The dependency audit on made-up environments: what it refuses, what it notes, what it does without a network."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit_dependencies", ROOT / ".ci" / "audit_dependencies.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Made(metadata.Distribution):
    """A distribution that only has metadata."""

    def __init__(self, name: str, requires: list[str], *, licence: str = "MIT", extras: tuple[str, ...] = ()) -> None:
        self._fields = Message()
        for field, value in (("Name", name), ("Version", "1.0+local"), ("License-Expression", licence)):
            self._fields[field] = value
        for extra in extras:
            self._fields["Provides-Extra"] = extra
        self._requires = requires

    @property
    def metadata(self) -> Any:
        return self._fields

    @property
    def requires(self) -> list[str]:
        return self._requires

    def read_text(self, filename: str) -> str | None:
        return "Root-Is-Purelib: true\nTag: py3-none-any\n" if filename == "WHEEL" else None

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError


def finder(*distributions: Made) -> Any:
    known = {one.metadata["Name"]: one for one in distributions}

    def find(name: str) -> Made:
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    return find


CORE = Made("eulerforge-core", ["Solid>=1", 'odd ; extra == "more"', 'never ; python_version < "3"'], extras=("more",))
SOLID = Made("solid", ["below[fast]"])
BELOW = Made("below", ['quick ; extra == "fast"'], licence="BSD-3-Clause AND MIT")
QUICK = Made("quick", ["solid"])  # a circle must end
WORLD = (CORE, SOLID, BELOW, QUICK)


def entries(audit: Any, **changes: dict[str, Any]) -> list[Any]:
    facts = {
        "solid": {"licence": "MIT", "direct": True, "version": "1.0"},
        "below": {"licence": "BSD-3-Clause AND MIT", "version": "1.0"},
        "quick": {"licence": "MIT", "version": "1.0"},
    }
    for name, change in changes.items():
        facts[name] = {**facts.get(name, {}), **change}
    return [audit.Entry(name=name, why="tests", **fact) for name, fact in facts.items()]


def verdict(audit: Any, inventory: list[Any], world: tuple[Made, ...] = WORLD) -> Any:
    installed, missing = audit.runtime(finder(*world), ["eulerforge-core"])
    return audit.compare(installed, missing, inventory)


def test_everything_below_is_found_with_extras_and_markers(audit: Any) -> None:
    installed, missing = audit.runtime(finder(*WORLD), ["eulerforge-core"])
    assert [(one.name, one.needed_by, one.version, one.wheel) for one in installed] == [
        ("below", ("solid",), "1.0", "pure"),
        ("quick", ("below",), "1.0", "pure"),
        ("solid", ("eulerforge-core", "quick"), "1.0", "pure"),
    ]
    assert missing == []


def test_what_is_as_recorded_passes(audit: Any) -> None:
    found = verdict(audit, entries(audit))
    assert (found.errors, found.notes) == ([], [])


def test_a_package_that_nobody_has_looked_at_is_an_error(audit: Any) -> None:
    found = verdict(audit, entries(audit)[:2])
    assert found.errors == ["quick 1.0 (for below) is not in the inventory"]


def test_another_licence_is_an_error(audit: Any) -> None:
    found = verdict(audit, entries(audit, below={"licence": "MIT"}))
    assert found.errors == ["below: licence BSD-3-Clause, recorded is MIT"]


def test_fewer_licences_and_another_spelling_are_none(audit: Any) -> None:
    found = verdict(audit, entries(audit, quick={"licence": "MIT License"}, solid={"licence": "Apache-2.0 AND MIT"}))
    assert found.errors == []


def test_a_dropped_direct_dependency_is_an_error(audit: Any) -> None:
    found = verdict(audit, entries(audit, gone={"licence": "MIT", "direct": True}))
    assert found.errors == ["gone is recorded as a direct dependency, and is none any more"]


def test_a_direct_dependency_that_is_now_only_below_another_is_dropped_too(audit: Any) -> None:
    found = verdict(audit, entries(audit, quick={"direct": True}))
    assert found.errors == ["quick is recorded as a direct dependency, and is none any more"]


def test_a_transitive_one_that_became_direct_is_an_error(audit: Any) -> None:
    found = verdict(audit, entries(audit, solid={"direct": False}))
    assert found.errors == ["solid is a direct dependency now, and recorded as a transitive one"]


def test_what_is_required_and_not_installed_is_an_error(audit: Any) -> None:
    found = verdict(audit, entries(audit), (CORE, SOLID, BELOW))
    assert found.errors == []  # only an extra of `below` wants it here, as for a package that pip was told to leave out
    found = verdict(audit, entries(audit), (CORE,))
    assert found.errors[0] == "solid is required by eulerforge-core, and not installed"


def test_versions_and_what_is_not_needed_are_notes(audit: Any) -> None:
    found = verdict(
        audit,
        entries(
            audit,
            quick={"version": "0.9"},
            idle={"licence": "MIT"},
            odd={"licence": "MIT", "direct": True, "optional": True},
        ),
    )
    assert found.errors == []
    assert found.notes == [
        "quick 1.0, recorded with 0.9",
        "idle is recorded, and not needed here",
        "odd is optional, and not installed here",
    ]


def test_a_pattern_covers_a_family(audit: Any) -> None:
    world = (*WORLD[:3], Made("quick", ["nv-one"]), Made("nv-one", [], licence="Their Own"))
    family = {"nv-*": {"licence": "not looked at", "optional": True}}
    assert verdict(audit, entries(audit, **family), world).errors == []
    assert verdict(audit, entries(audit), world).errors == ["nv-one 1.0 (for quick) is not in the inventory"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("MIT License", {"MIT"}),
        ("Apache Software License", {"Apache-2.0"}),
        ("Apache-2.0 OR BSD-2-Clause", {"Apache-2.0", "BSD-2-Clause"}),
        ("(MIT AND Zlib) OR 0BSD", {"MIT", "Zlib", "0BSD"}),
        ("ISC License (ISCL)", {"ISC"}),
        ("Somebody's Own", {"Somebody's Own"}),
    ],
)
def test_licences_are_read_as_spdx_names(audit: Any, text: str, names: set[str]) -> None:
    assert audit.licence_names(text) == names


def fake(tmp_path: Path, body: str) -> list[str]:
    script = tmp_path / "fake_pip_audit.py"
    script.write_text(body)
    return [sys.executable, "-S", str(script)]


FAULT = {"id": "CVE-1", "fix_versions": ["1.1"]}
ANSWER = {"dependencies": [{"name": "Solid", "version": "1.0", "vulns": [FAULT]}, {"name": "pytest", "vulns": [FAULT]}]}


def test_what_pip_audit_knows_of_runtime_packages_is_an_error(audit: Any, tmp_path: Path) -> None:
    command = fake(tmp_path, f"print({json.dumps(ANSWER)!r}); raise SystemExit(1)")
    faults, line = audit.known_faults({"solid"}, command, 30)
    assert faults == ["Solid 1.0: CVE-1, mended in 1.1"]
    assert line == "pip-audit looked at 2 packages"


def test_without_its_data_one_line_says_so(audit: Any, tmp_path: Path) -> None:
    command = fake(tmp_path, "import sys; sys.exit('ConnectionError: no route')")
    faults, line = audit.known_faults({"solid"}, command, 30)
    assert faults == []
    assert line == "pip-audit could not reach its data (ConnectionError: no route): only the inventory was checked"


def test_it_does_not_wait_for_ever(audit: Any, tmp_path: Path) -> None:
    faults, line = audit.known_faults({"solid"}, fake(tmp_path, "import time; time.sleep(60)"), 0.3)
    assert faults == []
    assert line.startswith("pip-audit had no answer within 0.3 s")


def test_the_exit_code_follows_the_errors(audit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.report(audit.Verdict(notes=["quick 2, recorded with 1"]), 3) == 0
    assert capsys.readouterr().out.startswith("note: quick 2")
    assert audit.report(audit.Verdict(errors=["bad"]), 3) == 1
    assert capsys.readouterr().err.splitlines()[0] == "error: bad"


def test_the_draft_of_a_package_is_an_entry_but_for_its_reason(audit: Any) -> None:
    installed, _ = audit.runtime(finder(*WORLD), ["eulerforge-core"])
    drafted = tomllib.loads("\n".join(audit.stanza(one) for one in installed))["package"]
    assert audit.compare(installed, [], [audit.Entry(**one) for one in drafted]).errors == []


def test_the_inventory_gives_a_reason_for_each_and_agrees_with_the_pins(audit: Any) -> None:
    inventory = {entry.name: entry for entry in audit.read_inventory(ROOT / "dependencies.toml")}
    assert all(entry.why and entry.needed_by and entry.licence for entry in inventory.values())
    pins = dict(
        line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert {name: entry.version for name, entry in inventory.items() if name in pins} == {
        name: version for name, version in pins.items() if name in inventory
    }


def test_the_inventory_marks_as_direct_what_our_projects_declare(audit: Any) -> None:
    """From pyproject.toml, so that it holds wherever the tests run, whatever is installed."""
    declared: set[str] = set()
    for path in (ROOT / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")):
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        extras = [one for group in project.get("optional-dependencies", {}).values() for one in group]
        declared |= {
            audit.canonicalize_name(audit.Requirement(one).name) for one in [*project["dependencies"], *extras]
        }
    marked = {entry.name for entry in audit.read_inventory(ROOT / "dependencies.toml") if entry.direct}
    assert marked == {name for name in declared if not name.startswith("eulerforge-")}
    page = (ROOT / "docs" / "explanation" / "dependencies.md").read_text(encoding="utf-8").lower()
    assert [name for name in marked if name not in page] == []
