"""Distributions that are installed as far as Python can tell: their source folders and metadata on the module path."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import attrs


@attrs.frozen
class SourceShelf:
    """``folder`` holds the metadata that ``pip install -e`` would write, for each folder in ``sources``."""

    folder: Path
    sources: list[Path] = attrs.field(factory=list)

    def add(self, source: Path) -> Path:
        """Make the distribution in ``source`` known."""
        table = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        name = table["name"].replace("-", "_")
        info = self.folder / f"{name}-{table['version']}.dist-info"
        info.mkdir(parents=True)
        head = f"Metadata-Version: 2.4\nName: {table['name']}\nVersion: {table['version']}\n"
        (info / "METADATA").write_text(head, encoding="utf-8")
        lines = [
            line
            for group, entries in table.get("entry-points", {}).items()
            for line in (f"[{group}]", *(f"{key} = {value}" for key, value in entries.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.sources.append(source)
        return source

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        path = [str(self.folder), *(str(source / "src") for source in self.sources), *filter(None, sys.path)]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=environ, cwd=self.folder, check=False
        )

    def run_tests(self, *sources: Path) -> dict[str, dict[str, str]]:
        """pytest on the tests of ``sources`` in one process.

        Returns:
            By folder name: test id -> the failure's message, empty when it passed.
        """
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        # a configuration of our own, so that the ids begin with the folder of each distribution
        (self.folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        root = os.path.commonpath([source.parent for source in sources])
        words = [
            "-m",
            "pytest",
            "-c",
            str(self.folder / "pytest.ini"),
            f"--rootdir={root}",
            "-q",
            "-p",
            "no:cacheprovider",
            "--import-mode=importlib",
            f"--junitxml={report}",
        ]
        done = self.python(*words, *(str(source / "tests") for source in sources))
        assert report.exists(), done.stdout + done.stderr
        results: dict[str, dict[str, str]] = {source.name: {} for source in sources}
        for case in ET.parse(report).iter("testcase"):
            assert case.find("skipped") is None, case.attrib
            faults = [*case.iter("failure"), *case.iter("error")]
            names = [name for name in results if f"{name}.tests" in case.get("classname", "")]
            assert len(names) == 1, (case.attrib, done.stdout[-2000:])
            results[names[0]][case.get("name", "")] = "".join(fault.get("message") or "error" for fault in faults)
        assert all(results.values()), f"no test was collected: {done.stdout}{done.stderr}"
        return results
