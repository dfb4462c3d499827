"""Where a path of a preset points: a plain path, or ``pkg://package/file`` for a file that an installed package brings.

Notable: the package is found, never imported, so a data package costs nothing and cannot run code.
"""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path, PurePosixPath

from eulerforge.errors import UsageError

SCHEME = "pkg://"


def is_package_location(text: str) -> bool:
    """Whether ``text`` is written as ``pkg://package/file``."""
    return text.startswith(SCHEME)


def expanded(text: str) -> Path:
    """A plain path with ``~`` read as a shell reads it: one that names nobody stays as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def from_the_root(text: str) -> str:
    """The path of what is there, to be found from every folder; all else is as it is written."""
    if is_package_location(text) or not expanded(text).exists():
        return text
    whole = str(expanded(text).absolute())
    # a folder above may have a name that no text file can hold
    return whole if whole.encode(errors="replace").decode() == whole else text


def resolve_location(text: str) -> Path:
    """The file or folder that ``text`` names.

    A ``pkg://`` location must exist; a plain path is only expanded (``~``), because the caller knows what it expects
    there. Raises UsageError for a malformed location, an absent package, a file that the package does not have, or one
    that is a link out of it.
    """
    if not is_package_location(text):
        return expanded(text)
    package, _, inner = text.removeprefix(SCHEME).partition("/")
    parts = PurePosixPath(inner).parts
    if not package.isidentifier() or not parts:
        raise UsageError(f"{text!r} is not a package location", hint="write pkg://package/path/inside/it")
    if ".." in parts or PurePosixPath(inner).is_absolute() or "\\" in inner:
        raise UsageError(
            f"{text!r} points outside of the package", hint="write the path inside the package, without .."
        )
    folder = _package_folder(package, text)
    path = folder.joinpath(*parts)
    if not path.exists():
        raise UsageError(f"the package {package} has no file {inner}", hint=_nearest(path))
    if not _lies_inside(path.resolve(), folder):
        raise UsageError(
            f"{text!r} is a link that leads out of the package {package}",
            hint="the package's author puts the file itself there",
        )
    return path


def _lies_inside(real: Path, folder: Path) -> bool:
    """Whether a file without links lies in the package, or where its code lies: installers may link file by file."""
    return any(real.is_relative_to(home) for home in (folder.resolve(), (folder / "__init__.py").resolve().parent))


def _package_folder(package: str, text: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise UsageError(
            f"{text!r} needs the package {package}, which is not installed",
            hint=f"pip install {package.replace('_', '-')}",
        )
    return Path(folders[0])


def _nearest(path: Path) -> str | None:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder.name} in it either"
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("__"))
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"it has {', '.join(names[:8])}" if names else None
