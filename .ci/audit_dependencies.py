"""Hold what is installed against ``dependencies.toml``: every package that a run may import, reviewed once by a person.

    python .ci/audit_dependencies.py            say what differs; exit 1 when something must be reviewed
    python .ci/audit_dependencies.py --stanza   a first draft for each package that is not in the inventory

A package that nobody has reviewed, a licence that was not recorded and a direct dependency that was dropped are errors.
Another version is a line, no error: what lies under our direct dependencies is not pinned.
When pip-audit is installed and reaches its data in time, what it knows of the runtime packages is an error too.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

INVENTORY = Path(__file__).parent.parent / "dependencies.toml"
CORE = "eulerforge-core"
OURS = "eulerforge-"
AUDIT_SECONDS = 120
SPELLINGS = {
    "mit license": "MIT",
    "apache software license": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache": "Apache-2.0",
    "bsd license": "BSD-3-Clause",
    "bsd": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "isc license (iscl)": "ISC",
    "isc license": "ISC",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
}
"""What packages write, and the SPDX name that it stands for."""


@attrs.frozen(kw_only=True)
class Installed:
    """One distribution: ``licences`` are SPDX names, ``needed_by`` the distributions that require it here."""

    name: str
    version: str
    licences: frozenset[str]
    needed_by: tuple[str, ...]
    wheel: str

    @property
    def direct(self) -> bool:
        return any(name.startswith(OURS) for name in self.needed_by)


@attrs.frozen(kw_only=True)
class Entry:
    """One ``[[package]]`` of the inventory; ``name`` may be a pattern such as ``nvidia-*``."""

    name: str
    licence: str
    why: str
    version: str = ""
    direct: bool = False
    needed_by: Sequence[str] = ()
    wheel: str = ""
    optional: bool = False


@attrs.define
class Verdict:
    errors: list[str] = attrs.field(factory=list)
    notes: list[str] = attrs.field(factory=list)


def licence_names(text: str) -> frozenset[str]:
    """The SPDX names of a licence expression; one unknown text stays as it is."""
    text = " ".join(text.split())
    if text.lower() in SPELLINGS:
        return frozenset({SPELLINGS[text.lower()]})
    if re.search(" (AND|OR) ", text):
        text = re.sub(r"[()]", " ", text)
    parts = re.split(r"\s+(?:AND|OR)\s+|\s*;\s*", text)
    return frozenset(SPELLINGS.get(part.strip().lower(), part.strip()) for part in parts if part.strip())


def licence_of(fields: Any) -> str:
    """What a distribution's metadata says: the expression, else the classifiers, else the first line of the text."""
    if expression := fields.get("License-Expression"):
        return str(expression)
    classified = [line.rpartition("::")[2].strip() for line in fields.get_all("Classifier", []) if "License ::" in line]
    classified = [name for name in classified if name != "OSI Approved"]
    if classified:
        return "; ".join(classified)
    return (str(fields.get("License") or "").strip() or "unknown").splitlines()[0][:80]


def runtime(find: Callable[[str], metadata.Distribution], roots: Sequence[str]) -> tuple[list[Installed], list[str]]:
    """All that ``roots`` require here, directly or not, and what is required and not there.

    Every extra of ours is looked at; of an extra that is not installed nothing is missing.
    """
    found: dict[str, metadata.Distribution] = {}
    needed: dict[str, set[str]] = {}
    missing: list[str] = []
    todo: list[tuple[str, frozenset[str]]] = []
    for root in roots:
        extras = find(root).metadata.get_all("Provides-Extra") or []
        todo.append((root, frozenset(extras)))
    done = set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in done:
            continue
        done.add((name, extras))
        for text in find(name).requires or []:
            wanted = Requirement(text)
            holds_always = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            if not holds_always and not any(wanted.marker and wanted.marker.evaluate({"extra": one}) for one in extras):
                continue
            below = canonicalize_name(wanted.name)
            try:
                found[below] = find(below)
            except metadata.PackageNotFoundError:
                if holds_always:
                    missing.append(f"{below} is required by {name}, and not installed")
                continue
            needed.setdefault(below, set()).add(name)
            todo.append((below, frozenset(wanted.extras)))
    packages = [
        Installed(
            name=name,
            version=found[name].version.partition("+")[0],
            licences=licence_names(licence_of(found[name].metadata)),
            needed_by=tuple(sorted(needed[name])),
            wheel=wheel_kind(found[name].read_text("WHEEL")),
        )
        for name in sorted(found)
        if not name.startswith(OURS)
    ]
    return packages, missing


def wheel_kind(text: str | None) -> str:
    """``pure`` for Python alone, ``compiled`` for a wheel of one platform, ``none`` for what came from no wheel."""
    if text is None:
        return "none"
    return "pure" if re.search(r"^Tag: \S+-none-any\s*$", text, re.MULTILINE) else "compiled"


def read_inventory(path: Path) -> list[Entry]:
    return [Entry(**package) for package in tomllib.loads(path.read_text(encoding="utf-8"))["package"]]


def compare(installed: Sequence[Installed], missing: Sequence[str], inventory: Sequence[Entry]) -> Verdict:
    """What differs: errors that a person must look at, and notes."""
    verdict = Verdict(errors=list(missing))
    here = {package.name: package for package in installed}
    for package in installed:
        entry = entry_for(package.name, inventory)
        if entry is None:
            by = ", ".join(package.needed_by)
            verdict.errors.append(f"{package.name} {package.version} (for {by}) is not in the inventory")
            continue
        new = package.licences - licence_names(entry.licence)
        if new and entry.licence != "not looked at":
            verdict.errors.append(f"{package.name}: licence {', '.join(sorted(new))}, recorded is {entry.licence}")
        if package.direct and not entry.direct:
            verdict.errors.append(f"{package.name} is a direct dependency now, and recorded as a transitive one")
        if entry.version and entry.version != package.version:
            verdict.notes.append(f"{package.name} {package.version}, recorded with {entry.version}")
        if entry.wheel and entry.wheel != package.wheel:
            verdict.notes.append(f"{package.name} comes as {package.wheel}, recorded as {entry.wheel}")
    for entry in inventory:
        package = here.get(entry.name)
        if entry.direct and not (package and package.direct):
            if not entry.optional:
                verdict.errors.append(f"{entry.name} is recorded as a direct dependency, and is none any more")
            elif package is None:
                verdict.notes.append(f"{entry.name} is optional, and not installed here")
        elif package is None and "*" not in entry.name and not entry.optional:
            verdict.notes.append(f"{entry.name} is recorded, and not needed here")
    return verdict


def entry_for(name: str, inventory: Sequence[Entry]) -> Entry | None:
    """The entry of this name, or the first pattern that it matches."""
    exact = [entry for entry in inventory if entry.name == name]
    return next(iter(exact or [entry for entry in inventory if fnmatch.fnmatchcase(name, entry.name)]), None)


def known_faults(names: set[str], command: Sequence[str], seconds: float) -> tuple[list[str], str]:
    """What pip-audit knows of the packages ``names``, and one line on how it went."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return [], f"pip-audit had no answer within {seconds:g} s: only the inventory was checked"
    try:
        listed = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
        return [], f"pip-audit could not reach its data ({last}): only the inventory was checked"
    faults = [
        f"{one['name']} {one['version']}: {fault['id']}, mended in {', '.join(fault['fix_versions']) or 'none yet'}"
        for one in listed
        if canonicalize_name(one["name"]) in names
        for fault in one.get("vulns", [])
    ]
    return faults, f"pip-audit looked at {len(listed)} packages"


def audit_command() -> list[str] | None:
    if importlib.util.find_spec("pip_audit") is None:
        return None
    return [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]


def stanza(package: Installed) -> str:
    return "\n".join(
        (
            "[[package]]",
            f'name = "{package.name}"',
            f'version = "{package.version}"',
            f'licence = "{" AND ".join(sorted(package.licences))}"',
            *(["direct = true"] if package.direct else []),
            f"needed_by = {json.dumps(list(package.needed_by))}",
            f'wheel = "{package.wheel}"',
            'why = ""',
            "",
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stanza", action="store_true", help="print a draft for what is not in the inventory")
    parser.add_argument("--inventory", type=Path, default=INVENTORY)
    args = parser.parse_args(arguments)
    installed, missing = runtime(metadata.distribution, our_distributions(metadata.distributions()))
    inventory = read_inventory(args.inventory)
    if args.stanza:
        print("\n".join(stanza(one) for one in installed if entry_for(one.name, inventory) is None))
        return 0
    verdict = compare(installed, missing, inventory)
    command = audit_command()
    if command is None:
        verdict.notes.append("pip-audit is not installed: only the inventory was checked")
    else:
        faults, line = known_faults({one.name for one in installed}, command, AUDIT_SECONDS)
        verdict.errors += faults
        verdict.notes.append(line)
    return report(verdict, len(installed))


def our_distributions(all_of_them: Iterator[metadata.Distribution] | Sequence[metadata.Distribution]) -> list[str]:
    """The core and its plugins, as far as they are installed."""
    names = {canonicalize_name(one.metadata["Name"]) for one in all_of_them if one.metadata["Name"]}
    return sorted(
        name
        for name in names
        if name == CORE or name.startswith((f"{OURS}backbone", f"{OURS}strategy", f"{OURS}phases"))
    )


def report(verdict: Verdict, count: int) -> int:
    for note in verdict.notes:
        print(f"note: {note}")
    for error in verdict.errors:
        print(f"error: {error}", file=sys.stderr)
    if verdict.errors:
        print("hint: look at it, then record it: make audit ARGS=--stanza drafts what is missing", file=sys.stderr)
        return 1
    print(f"{count} runtime packages are as recorded in dependencies.toml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
