"""Which data files a preset names: found, checked to be readable text, and hashed by content."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import attrs

from eulerforge.config.atomic import sha256_of
from eulerforge.config.location import is_package_location, resolve_location
from eulerforge.errors import DataError, Problem, UsageError

_OTHER_FORMATS = {
    ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".bz2", ".xz", ".zip", ".xlsx", ".feather",
}  # fmt: skip


@attrs.frozen(kw_only=True)
class DataFile:
    """One data file: ``name`` is what the user wrote and what messages show, ``path`` is where it is."""

    name: str
    path: Path

    def sha256(self) -> str:
        """Hash of the content, in hexadecimal."""
        return sha256_of(self.path)


def find_files(names: Sequence[str], *, key: str = "data.path") -> tuple[DataFile, ...]:
    """The files behind ``names``; raises DataError with all that is wrong with any of them."""
    files: list[DataFile] = []
    problems: list[Problem] = []
    for name in names:
        try:
            path = resolve_location(name)
        except UsageError as error:
            problems += [attrs.evolve(problem, key=key) for problem in error.problems]
            continue
        wrong = what_is_wrong(name, path)
        if wrong is None:
            files.append(DataFile(name=name, path=path))
        else:
            problems.append(Problem(message=wrong[0], hint=wrong[1], key=key))
    if problems:
        raise DataError.of(problems)
    if not files:
        raise DataError("no data file is named", hint=f"--set {key}=rows.jsonl", key=key)
    return tuple(files)


def what_is_wrong(name: str, path: Path) -> tuple[str, str | None] | None:
    """Message and hint of a file that cannot hold rows; None where it may."""
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in {".jsonl", ".json"})
        hint = f"name a file in it: {', '.join(inside[:5])}" if inside else "name a .jsonl file"
        return f"{name} is a folder", hint
    if path.suffix.lower() in _OTHER_FORMATS:
        return f"{name}: {path.suffix} files are not read", "convert it to JSON lines: one JSON object per line"
    try:
        with path.open("rb"):
            return None
    except FileNotFoundError:
        return f"{name} does not exist", _nearest(name, path)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}", None


def _nearest(name: str, path: Path) -> str | None:
    try:
        siblings = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        where = "" if is_package_location(name) else f" (looked from {Path.cwd()})"
        return f"there is no folder {path.parent} either{where}"
    close = difflib.get_close_matches(path.name, siblings, n=1)
    if close:
        return f"did you mean {path.parent / close[0]}?"
    return None if path.is_absolute() else f"looked in {path.parent.absolute()}"
