"""A fresh virtual environment, and wheels that are built from source folders and installed in it.

The environment borrows torch and the other big packages from this one through a folder of links, and nothing of ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

OURS = ("eulerforge", "_editable_impl_eulerforge", "__editable__", "__pycache__")


@attrs.frozen
class Venv:
    """A virtual environment and the wheels that may be installed in it."""

    folder: Path
    wheels: dict[str, Path]

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def install(self, name: str) -> None:
        self.pip("install", "--no-index", "--no-deps", str(self.wheels[name]))

    def uninstall(self, distribution: str) -> None:
        self.pip("uninstall", "--yes", distribution)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "EULERFORGE"))}
        environ = {
            **keep,
            "NO_COLOR": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "EULERFORGE_CACHE": str(self.folder / "cache"),
            **variables,
        }
        command = [str(self.folder / "bin" / "eulerforge"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environ, cwd=self.folder, check=False)

    def data(self, *arguments: str, code: int = 0) -> Any:
        """What a ``--json`` command answers."""
        done = self.run(*arguments, "--json")
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        answer = json.loads(done.stdout)
        assert answer["schema"] == 1
        return answer["data"] if answer["ok"] else answer["problems"]

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.data("plugins", "list")["plugins"]}


def build(source: Path, out: Path, *targets: str) -> list[Path]:
    """Build the ``targets`` (wheel, sdist) of a source folder into ``out``."""
    wanted = [word for target in targets for word in ("-t", target)]
    command = [sys.executable, "-m", "hatchling", "build", *wanted, "-d", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(out.iterdir())


def make_venv(folder: Path, wheels: Mapping[str, Path]) -> Venv:
    """An environment below ``folder`` that has none of the wheels yet."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (site_packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for parent in {Path(sysconfig.get_paths()[key]) for key in ("purelib", "platlib")}:
        for entry in parent.iterdir():
            if not entry.name.startswith(OURS) and entry.suffix != ".pth":
                (borrowed / entry.name).symlink_to(entry)
    (site_packages / "borrowed.pth").write_text(f"{borrowed}\n")
    return Venv(folder / "venv", dict(wheels))
