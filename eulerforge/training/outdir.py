"""The run's folder: one writer at a time, and never a run on top of another by accident."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import tomli

from eulerforge.config.atomic import fsync_path, put_back_replaced, remove_leftovers
from eulerforge.config.location import from_the_root
from eulerforge.errors import CheckpointError, RunError, UsageError
from eulerforge.models.source import EXPORT_FILE
from eulerforge.models.source import RUN_FILE as CONFIG_FILE
from eulerforge.training.checkpoint import ADAPTER_FILE, OPTIMIZER_FILE
from eulerforge.training.final import FOLDER as FINAL
from eulerforge.training.final import FULL_PATTERN
from eulerforge.training.manifest import MANIFEST_FILE, STATE_FILE, read_state, verify
from eulerforge.training.metrics import read_metrics
from eulerforge.training.receipt import FILE_NAME as RECEIPT_FILE
from eulerforge.training.rotation import checkpoint_paths, delete_folder, latest_complete

if TYPE_CHECKING:
    from eulerforge.config.schema import RunConfig, TrainingConfig
    from eulerforge.models.source import BaseSource

SUMMARY_FILE = "summary.json"
LOCK_FILE = ".lock"
# the configuration is written first and deleted last: a folder with a part of a run always holds it
_OURS = (SUMMARY_FILE, "metrics.jsonl", RECEIPT_FILE, CONFIG_FILE)
_WRITTEN = (ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE)
_WITH_BASE = FULL_PATTERN.partition("{")[0]


def is_used(out: Path) -> bool:
    """Whether a run has begun in this folder."""
    return (out / CONFIG_FILE).exists()


def is_finished(out: Path) -> bool:
    return (out / FINAL / MANIFEST_FILE).exists()


def is_finished_and_whole(out: Path, say: Callable[[str], None], training: TrainingConfig) -> bool:
    """Whether nothing is left to do; a ``final`` that is damaged is said, and is to be written again.

    A run of fewer steps or epochs than are wanted now goes on from its newest checkpoint, if its other keys let it.

    Raises:
        CheckpointError: it has none, and would begin anew over what it has.
    """
    if not is_finished(out):
        return False
    try:
        verify(out / FINAL)
        final = read_state(out / FINAL)
    except CheckpointError as error:
        if latest_complete(out, say=say) is None:
            refuse_to_begin_anew(out, f"{error}; ")
        say(f"{error}; it will be written again")
        return False
    steps = training.max_train_steps
    if not (
        _epochs_are_more(out, final.step, training.num_epochs or 1.0, say) if steps is None else steps > final.step
    ):
        return True
    if latest_complete(out, say=say, run_id=final.run_id) is None:
        raise CheckpointError(
            f"{out} is finished at step {final.step} and has no complete checkpoint to go on from",
            key="training.max_train_steps" if steps is not None else "training.num_epochs",
            hint="--output-dir takes another folder, --overwrite starts anew and deletes what is there",
        )
    return False


def refuse_to_begin_anew(out: Path, why: str = "") -> None:
    """Refuse to resume at step 0 where that would write over what an earlier run left.

    Raises:
        CheckpointError: there is a ``final`` or a checkpoint; ``why`` goes before what is said of it.
    """
    left = [path for path in run_paths(out) if path.is_dir() and any(path.iterdir())]
    if left:
        raise CheckpointError(
            f"{why}{out} has no complete checkpoint to go on from, and step 0 on would write over {left[0].name}",
            hint="--output-dir takes another folder, --overwrite starts anew; merge and export need of final only"
            " its adapter.safetensors, state.json and manifest.json",
        )


def _epochs_are_more(out: Path, step: int, epochs: float, say: Callable[[str], None]) -> bool:
    """Whether a run that ended at ``step`` has gone through its rows less often, as its metrics say."""
    seen = [row["epoch"] for row in read_metrics(out, say=say) if row.get("step") == step and "epoch" in row]
    return bool(seen) and epochs > seen[-1] + 1e-9


def went_on_to(out: Path) -> Path | None:
    """The newest checkpoint of a finished run that was made longer and has not come to its new end; else None."""
    try:
        final = read_state(out / FINAL)
        newest = latest_complete(out, run_id=final.run_id)
        return newest if newest is not None and read_state(newest).step > final.step else None
    except CheckpointError:
        return None


def check_free(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that cannot be written to or that another run has used; before anything slow is done.

    Raises:
        UsageError: it is used and neither --resume nor --overwrite is given, it is not a folder, or --overwrite would
            let what no run wrote be written over.
    """
    if resume and overwrite:
        raise UsageError(
            "--resume and --overwrite exclude each other", hint="--resume goes on, --overwrite starts anew"
        )
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is not a folder", key="output_dir", hint="give a folder, or a name that is free")
    if is_used(out) and not (resume or overwrite):
        finished = is_finished(out) and went_on_to(out) is None
        state = "a finished run" if finished else "an unfinished run"
        raise UsageError(
            f"{out} holds {state}",
            key="output_dir",
            hint="--overwrite starts anew and deletes it; --output-dir takes another folder"
            if finished
            else "--resume goes on with it, --overwrite starts anew and deletes it",
        )
    if overwrite and is_used(out):
        refuse_foreign(out)
    if not is_used(out) and any(map(os.path.lexists, (*run_paths(out), *(out / name for name in _OURS)))):
        raise UsageError(
            f"{out} holds files that a run would overwrite, but no run", key="output_dir", hint="take another folder"
        )


def refuse_base(out: Path, base: Path) -> None:
    """Refuse the base model's folder, and one inside of it: what the run writes would become a part of the base.

    Raises:
        UsageError: ``out`` is there.
    """
    if out.resolve().is_relative_to(base.resolve()):
        raise UsageError(
            f"{out} is in the base model's own folder", key="output_dir", hint="take another folder: --output-dir"
        )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder, made when it is not there, until the block ends; the system lets go of it if we die.

    Raises:
        UsageError: another process holds it, or the lock file is a link, whose target would be emptied.
        RunError: it cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / LOCK_FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        file = os.fdopen(descriptor, "a+", encoding="utf-8")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(
                f"{out / LOCK_FILE} is a link; a run writes to files of its own folder only",
                key="output_dir",
                hint="look where the folder comes from, then delete the link",
            ) from error
        raise RunError(
            f"{out} cannot be written: {error.strerror}", hint="take another folder: --output-dir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UsageError(
                f"another run is writing to {out} (process {file.read().strip() or 'unknown'})",
                key="output_dir",
                hint="wait for it, or take another folder: --output-dir",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def run_paths(out: Path) -> list[Path]:
    """Where a run writes its folders: ``final``, there or not, and what has the name of a checkpoint, newest first."""
    return [out / FINAL, *checkpoint_paths(out)]


def own_bytes(out: Path) -> int:
    """What ``clear`` would free, at least."""
    real = (folder for folder in _own_folders(out) if not folder.is_symlink())
    return sum(file.lstat().st_size for folder in real for file in folder.glob("*") if file.is_file())


def _own_folders(out: Path) -> list[Path]:
    """``final`` and the checkpoints that are complete; what has no manifest is not a run's."""
    return [folder for folder in run_paths(out) if (folder / MANIFEST_FILE).exists()]


def refuse_foreign(out: Path, *, damaged_may_go: bool = False) -> None:
    """Refuse to write a run where ``final`` or a checkpoint holds something that is no run's.

    Args:
        damaged_may_go: one that has lost its manifest, and holds only what a run writes, is written anew by a resume.

    Raises:
        UsageError: it names the folder.
    """
    for path in run_paths(out):
        if not path.exists() or (path / MANIFEST_FILE).exists():
            continue
        held = [entry.name for entry in path.iterdir()] if path.is_dir() else [path.name]
        if damaged_may_go and all(name in _WRITTEN or name.startswith(_WITH_BASE) for name in held):
            continue
        if held:
            raise UsageError(
                f"{path} has no {MANIFEST_FILE}, so no run wrote it whole, and this one may take its place",
                key="output_dir",
                hint="move it out of this folder or delete it; --output-dir takes another folder",
            )


def exports_in(out: Path) -> list[Path]:
    """The merged models and adapters that lie in the run's folder."""
    return sorted(path.parent for path in out.glob(f"[!.]*/{EXPORT_FILE}"))


def with_recorded_revision(config: RunConfig, out: Path) -> RunConfig:
    """With the commit that a run of the same model in ``out`` began with, where the preset names none."""
    try:
        began = tomli.loads((out / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return config
    recorded = began.get("model", {}).get("revision")
    if recorded is None or config.model.revision is not None or began.get("model_name") != config.model_name:
        return config
    return attrs.evolve(config, model=attrs.evolve(config.model, revision=recorded))


def found_from_everywhere(config: RunConfig, source: BaseSource) -> RunConfig:
    """With whole paths: what is read later, from another folder, may not be other files of the same names."""
    held_out = config.data.validation
    held_out = attrs.evolve(held_out, path=tuple(map(from_the_root, held_out.path)))
    data = attrs.evolve(config.data, path=tuple(map(from_the_root, config.data.path)), validation=held_out)
    model = config.model_name if source.kind == "hub" else from_the_root(config.model_name)
    out = config.output_dir and from_the_root(config.output_dir)
    return attrs.evolve(config, model_name=model, data=data, output_dir=out)


def clear(out: Path) -> None:
    """Delete what an earlier run wrote, and nothing else; the folder must be locked and ``is_used``."""
    for folder in _own_folders(out):
        delete_folder(folder)
    for name in _OURS:
        (out / name).unlink(missing_ok=True)
    fsync_path(out)


def sweep(out: Path, say: Callable[[str], None]) -> None:
    """Put back and delete what interrupted writes left; the folder must be locked."""
    for name in put_back_replaced(out):
        say(f"put back {name}, which an interrupted write had moved away")
    for name in remove_leftovers(out):
        say(f"removed {name}, which an interrupted write left")
