"""The checkpoints that a run's folder has: which is the newest complete one, and which may go."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from eulerforge.config.atomic import STAGING_PREFIX, fsync_path, remove_tree
from eulerforge.errors import CheckpointError
from eulerforge.training.identity import BASE, HELD_OUT
from eulerforge.training.manifest import TrainState, check_sizes, read_manifest, read_state, verify


def checkpoint_paths(out: Path) -> list[Path]:
    """What has the name of a checkpoint, whatever it is, newest first."""
    named = (path for path in out.glob("checkpoint-*") if path.name[11:].isdigit())
    return sorted(named, key=lambda path: -_step_of(path))


def checkpoint_folders(out: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    return [path for path in checkpoint_paths(out) if path.is_dir()]


def latest_complete(out: Path, *, say: Callable[[str], None] | None = None, run_id: str = "") -> Path | None:
    """The newest checkpoint that passes ``verify``; what is skipped on the way is said, with the reason.

    With ``run_id``, those of another run are skipped too; one that has none was written before there were any.
    """
    for folder in complete_checkpoints(out, say=say, run_id=run_id):
        return folder
    return None


def complete_checkpoints(out: Path, *, say: Callable[[str], None] | None = None, run_id: str = "") -> Iterator[Path]:
    """Every checkpoint that ``latest_complete`` might give, newest first."""
    for folder in checkpoint_folders(out):
        try:
            theirs = verify(folder).get("run_id", "")
            read_state(folder)
            if run_id and theirs and theirs != run_id:
                raise CheckpointError(
                    f"it belongs to another run ({theirs}, this one is {run_id})", hint="move it out of this folder"
                )
        except CheckpointError as error:
            if say is not None:
                say(f"skipped {folder.name}: {error}")
            continue
        yield folder


def rotate(out: Path, state: TrainState, *, keep_last: int | None, keep_best: int | None) -> list[Path]:
    """The checkpoints that may go after the one of ``state`` was written, oldest first.

    Only complete ones of the same run are counted and named: a damaged one never takes the place of a good one.
    ``keep_best`` keeps those of the lowest held-out loss; without ``keep_last`` the newest one stays beside them.
    Losses on other rows, or of another base, are no higher and no lower: each such part of a run keeps its best.
    """
    if keep_last is None and keep_best is None:
        return []
    own: list[tuple[Path, float | None, str]] = []
    for folder in checkpoint_folders(out):
        try:
            manifest = read_manifest(folder)
            check_sizes(folder, manifest["files"])
            facts = read_state(folder).identity
        except CheckpointError:
            continue
        if manifest.get("run_id", "") == state.run_id:
            measured_on = json.dumps([facts.get(key) for key in (HELD_OUT, *BASE)])
            own.append((folder, manifest.get("held_out_loss"), measured_on))
    # one beyond this step lies on a branch that the run has left, and may not count as the newest
    past = [(folder, loss, part) for folder, loss, part in own if _step_of(folder) <= state.step]
    kept = {folder for folder, *_ in past[: keep_last or 1]}
    parts: dict[str, list[tuple[float, int, Path]]] = {}
    for folder, loss, part in past:
        # NaN is not below any number nor above it, and would stand wherever it came
        if loss is not None and math.isfinite(loss):
            parts.setdefault(part, []).append((loss, -_step_of(folder), folder))
    for measured in parts.values():
        kept |= {folder for *_, folder in sorted(measured)[: keep_best or 0]}
    return [folder for folder, *_ in reversed(past) if folder not in kept]


def delete_rotated(out: Path, state: TrainState, *, keep_last: int | None, keep_best: int | None) -> None:
    """Delete what ``rotate`` names."""
    for old in rotate(out, state, keep_last=keep_last, keep_best=keep_best):
        delete_folder(old)


def delete_folder(folder: Path) -> None:
    """Hide first, then delete: a half-deleted checkpoint is never seen under its name."""
    hidden = folder.with_name(f"{STAGING_PREFIX}deleted-{folder.name}")
    if hidden.exists():
        remove_tree(hidden)
    folder.rename(hidden)
    fsync_path(folder.parent)
    remove_tree(hidden)


def _step_of(folder: Path) -> int:
    return int(folder.name[11:])
