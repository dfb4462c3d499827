"""Where an export goes: what it may replace, the room that it needs, and the folder that it is written in until then.

Notable: ``--overwrite`` replaces what the earlier export wrote and nothing else. What a person has put there or changed
is found by the receipt's list of files, and refused by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from eulerforge.config.atomic import remove_leftovers, sha256_of, staged_folder
from eulerforge.errors import UsageError
from eulerforge.export.rundir import TrainedRun
from eulerforge.models.source import EXPORT_FILE as RECEIPT
from eulerforge.training.diskroom import room_for

MAKE_ROOM = "make room there, or take a folder on another disk with --output; nothing is left half written"
WEIGHTS_SUFFIX = ".safetensors"


def check_destination(out: Path, run: TrainedRun, *, overwrite: bool) -> None:
    """Refuse a destination that would destroy something.

    Raises:
        UsageError: ``out`` exists and may not be replaced, or is or holds the base's or the run's own folder.
    """
    where = out.resolve()
    base = run.source.folder.resolve()
    if where == base or base.is_relative_to(where) or where.is_relative_to(base):
        raise UsageError(f"{out} and the base model's folder {base} overlap", hint="choose another --output")
    if run.folder.resolve().is_relative_to(where) or where.is_relative_to(run.checkpoint.resolve()):
        raise UsageError(f"{out} would replace a part of the run {run.folder}", hint="choose another --output")
    refuse_existing(out, overwrite=overwrite)


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Refuse a destination that exists, unless it is empty, or an earlier export that may be overwritten.

    Raises:
        UsageError: it may not be replaced.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file", hint="choose another --output")
    if out.is_mount():  # an export appears by a rename, which a mount point cannot take part in
        raise UsageError(f"{out} is a mount point, which cannot be replaced", hint=f"--output {out / 'model'}")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{out} exists already", hint="give --overwrite, or another --output")
    if not (out / RECEIPT).is_file():
        raise UsageError(
            f"{out} is no export of ours (it has no {RECEIPT}), so it is not overwritten",
            hint="choose another --output, or delete the folder yourself",
        )
    if not out.is_symlink() and (lost := list(_not_the_export_s(out))):  # of a link only the link is replaced
        raise UsageError(
            f"--overwrite would delete {out / lost[0]}, which the export did not write, or not as it is now"
            + (f" ({len(lost) - 1} more)" if lost[1:] else ""),
            hint="move it out of the folder to keep it, or choose another --output",
        )


def files_of(folder: Path) -> dict[str, str | None]:
    """Every file below an export with its SHA-256; None for weights, which are known by their names."""
    return {name: None if name.endswith(WEIGHTS_SUFFIX) else sha256_of(folder / name) for name in _names_in(folder)}


def prepare(out: Path, needed: int, say: Callable[[str], None]) -> None:
    """Remove what killed exports to this place have left, then refuse a disk without room: before anything slow.

    Raises:
        RunError: with what is needed and what is free.
    """
    place = _place_of(out)
    for name in remove_leftovers(place.parent, of=place.name):
        say(f"removed {place.parent / name}, which an interrupted export left")
    with room_for(place, needed, hint=MAKE_ROOM):
        pass


@contextmanager
def staged_export(out: Path, needed: int, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write the export into, which becomes ``out`` when the block ends well.

    Raises:
        RunError: the disk is full or not writable.
        UsageError: what lies in ``out`` has come there in the meantime.
    """
    place = _place_of(out)
    with room_for(place, needed, hint=MAKE_ROOM), staged_folder(place, replace=out.is_dir()) as staging:
        yield staging
        refuse_existing(out, overwrite=overwrite)


def _place_of(out: Path) -> Path:
    """Where an export is written: a link is followed, for whose room it was made; but over an earlier export the link
    goes and what it leads to stays."""
    return out if out.is_dir() and any(out.iterdir()) else out.resolve()


def _not_the_export_s(out: Path) -> Iterator[str]:
    """The files of an earlier export that its receipt does not list, or that have changed since."""
    try:
        listed = dict(json.loads((out / RECEIPT).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        listed = {}
    for name in _names_in(out):
        if name == RECEIPT:
            continue
        written = listed.get(name, "")
        if written is not None and not ((out / name).is_file() and sha256_of(out / name) == written):
            yield name


def _names_in(folder: Path) -> list[str]:
    """The files below a folder, and what else is no folder; a link to one is not followed."""
    found = []
    for directory, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(directory) / name).is_symlink()]
        found += [(Path(directory) / name).relative_to(folder).as_posix() for name in (*names, *links)]
    return sorted(found)
