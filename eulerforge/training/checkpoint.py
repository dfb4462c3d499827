"""Checkpoints: everything that a run needs to go on as if it had never stopped, complete or invisible.

``checkpoint-<step>/`` holds ``adapter.safetensors`` (every tensor that ever trains, fp32), ``optimizer.safetensors``,
``state.json``, and ``manifest.json`` with the size and sha256 of each, written when the others are on the disk.
The order of a save: stage, flush the files, manifest, flush, one rename, flush the folder; only then old ones go.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from eulerforge.api import InjectionReport
from eulerforge.config.atomic import (
    STAGING_PREFIX,
    fsync_path,
    remove_tree,
    sha256_of,
    staged_folder,
    write_file,
    write_json_atomic,
)
from eulerforge.errors import CheckpointError, RunError
from eulerforge.lora.state import adapter_state, load_adapter_state
from eulerforge.models.sizes import gib
from eulerforge.models.source import MANIFEST as MANIFEST_FILE
from eulerforge.training.identity import BASE, HELD_OUT
from eulerforge.training.optimizer import load_optimizer_tensors, optimizer_tensors

ADAPTER_FILE = "adapter.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
SCHEMA = 1
OTHER_HINT = "use another checkpoint of the run"
SLACK_BYTES = 1 << 20
"""What a checkpoint needs beside its tensors: headers, state, manifest, blocks that are not full."""


@attrs.define(kw_only=True)
class TrainState:
    """How far a run is. ``step`` counts finished optimizer steps; ``seconds`` is time spent in steps.

    ``skipped`` counts the steps whose loss or gradient was not finite.
    ``identity`` says what the run is made of, by configuration key; ``before`` is what was measured of the base.
    ``held_out`` is the last held-out loss, {step, loss}; ``run_id`` tells the checkpoints of two runs apart.
    """

    step: int = 0
    tokens: int = 0
    label_tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    run_id: str = ""
    held_out: dict[str, Any] = attrs.field(factory=dict)
    identity: dict[str, Any] = attrs.field(factory=dict)
    before: dict[str, Any] = attrs.field(factory=dict)


def trained_tensors(model: nn.Module, trained_names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """All adapters, and every base parameter that ever trains, on the CPU."""
    parameters = dict(model.named_parameters())
    tensors = adapter_state(model) | {name: parameters[name].detach() for name in trained_names}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def save_checkpoint(
    out: Path,
    state: TrainState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    report: InjectionReport,
    trained_names: tuple[str, ...],
    *,
    keep_last: int | None = None,
    keep_best: int | None = None,
) -> Path:
    """Write ``checkpoint-<step>``, then delete what ``rotate`` names.

    Raises:
        RunError: the disk is full or not writable, or a tensor is not finite; earlier checkpoints are as they were.
    """
    folder = out / f"checkpoint-{state.step}"
    adapter, moments = trained_tensors(model, trained_names), optimizer_tensors(optimizer, model)
    refuse_not_finite(adapter | moments, folder)
    with room_for(folder, tensor_bytes(adapter) + tensor_bytes(moments)):
        with staged_folder(folder, replace=True) as staging:
            write_tensors(staging / ADAPTER_FILE, adapter)
            write_tensors(staging / OPTIMIZER_FILE, moments)
            write_state(staging, state)
            write_manifest(staging, "checkpoint", state.step, report, run_id=state.run_id, held_out=_loss_at(state))
        delete_rotated(out, state, keep_last=keep_last, keep_best=keep_best)
    return folder


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file, by our own writes and not the library's: the same tensors give the same bytes."""
    write_file(path, save(dict(tensors), metadata={"format": "pt"}))


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@contextmanager
def room_for(folder: Path, needed: int, *, hint: str = "") -> Iterator[None]:
    """Refuse a write that will not fit, and name the numbers when one fails.

    Raises:
        RunError: the disk is full or not writable.
    """
    needed += SLACK_BYTES
    hint = f"make room{hint}, then go on with --resume; earlier checkpoints are untouched"
    numbers = f"{gib(needed)} ({needed:,} bytes) are needed"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < needed:
            raise RunError(f"{folder} was not written: {numbers} and {gib(free)} ({free:,} bytes) are free", hint=hint)
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder} could not be written: {error}; {numbers}", hint=hint) from error


def refuse_not_finite(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Raises RunError when a tensor holds NaN or infinity: a checkpoint is always one to go on from."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"{folder} was not written: {name} is not finite",
                hint="a smaller training.lr or a longer warm-up usually mends it; --resume goes on from the last one",
            )


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
            manifest = _read_manifest(folder)
            _check_sizes(folder, manifest["files"])
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


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, trained_names: tuple[str, ...]
) -> TrainState:
    """Put a checkpoint's tensors into the model and the optimizer; give back its state.

    Raises:
        CheckpointError: a tensor is missing, is not expected, or has another shape.
    """
    load_trained(folder, model, trained_names)
    load_optimizer_tensors(optimizer, model, load_file(folder / OPTIMIZER_FILE))
    return read_state(folder)


def load_trained(
    folder: Path, model: nn.Module, trained_names: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """Copy what a run trained, adapters and base weights, into a model that was injected in the same way.

    Args:
        trained_names: the parameters that the run trains; None takes the base weights that the folder holds.

    Returns:
        The base weights among them, by their names in the injected model.

    Raises:
        CheckpointError: the file is damaged, or a tensor is missing, is not expected, or has another shape.
    """
    path = folder / ADAPTER_FILE
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="use an earlier checkpoint") from error
    own, adapters = dict(model.named_parameters()), adapter_state(model).keys()
    base = {name: tensor for name, tensor in found.items() if name not in adapters}
    expected = base.keys() if trained_names is None else set(trained_names) - adapters
    wrong = sorted(expected ^ base.keys()) or [
        name for name, tensor in base.items() if name not in own or own[name].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointError(
            f"{folder} does not fit the model: {len(wrong)} tensors differ, {wrong[0]} first",
            hint="use the preset and the base that the run was started with",
        )
    load_adapter_state(model, {name: tensor for name, tensor in found.items() if name in adapters})
    with torch.no_grad():
        for name, tensor in base.items():
            own[name].copy_(tensor)
    return base


def fits(folder: Path, model: nn.Module, trained_names: tuple[str, ...]) -> bool:
    """Whether a checkpoint's tensors are those that train now, by name and shape; only the file's header is read."""
    own = dict(model.named_parameters())
    expected = {name: tensor.shape for name, tensor in adapter_state(model).items()}
    expected |= {name: own[name].shape for name in trained_names}
    with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        names = list(file.keys())
        return expected == {name: torch.Size(file.get_slice(name).get_shape()) for name in names}


def write_state(folder: Path, state: TrainState) -> None:
    write_json_atomic(folder / STATE_FILE, attrs.asdict(state))


def read_state(folder: Path) -> TrainState:
    """The state of a checkpoint or of ``final``.

    Raises:
        CheckpointError: it is not there or not readable.
    """
    try:
        return TrainState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / STATE_FILE} cannot be read: {error}", hint=OTHER_HINT) from error


def write_manifest(
    folder: Path,
    kind: str,
    step: int,
    report: InjectionReport,
    *,
    run_id: str = "",
    held_out: float | None = None,
) -> None:
    """Flush every file of ``folder`` to the disk, then list each with size and hash: the last file to be written."""
    from eulerforge import __version__

    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(STAGING_PREFIX)]
    for path in paths:
        fsync_path(path)
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
    manifest = {"schema": SCHEMA, "kind": kind, "step": step, "run_id": run_id, "eulerforge": __version__}
    manifest |= {"held_out_loss": held_out, "files": files}
    write_json_atomic(folder / MANIFEST_FILE, {**manifest, "injection": report.to_json()})


def verify(folder: Path, *, only: Collection[str] | None = None) -> Mapping[str, Any]:
    """The manifest of a folder whose files are all there, unchanged; with ``only``, those that the caller will read.

    Raises:
        CheckpointError: it says which file is wrong and how.
    """
    manifest = _read_manifest(folder)
    wanted = {name: facts for name, facts in manifest["files"].items() if only is None or name in only}
    _check_sizes(folder, wanted)
    for name, facts in wanted.items():
        if sha256_of(folder / name) != facts["sha256"]:
            raise CheckpointError(f"{folder / name} has changed since it was written", hint=OTHER_HINT)
    return manifest


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


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        for facts in manifest["files"].values():
            facts["size"], facts["sha256"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST_FILE}: it is not complete", hint=OTHER_HINT) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST_FILE} cannot be read: {error}", hint=OTHER_HINT) from error
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{folder} has format {manifest.get('schema')}, this version reads {SCHEMA}", hint=OTHER_HINT
        )
    return manifest


def _check_sizes(folder: Path, files: Mapping[str, Any]) -> None:
    for name, facts in files.items():
        path = folder / name
        if Path(name).name != name or name == "..":
            raise CheckpointError(f"{folder / MANIFEST_FILE} names a file outside its folder: {name}", hint=OTHER_HINT)
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing", hint=OTHER_HINT)
        if path.stat().st_size != facts["size"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {facts['size']}", hint=OTHER_HINT)


def checkpoint_folders(out: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    return sorted((path for path in checkpoint_paths(out) if path.is_dir()), key=lambda path: -_step_of(path))


def checkpoint_paths(out: Path) -> Iterator[Path]:
    """What has the name of a checkpoint, whatever it is."""
    return (path for path in out.glob("checkpoint-*") if path.name[11:].isdigit())


def _step_of(folder: Path) -> int:
    return int(folder.name[11:])


def _loss_at(state: TrainState) -> float | None:
    """The held-out loss of exactly this step, if it was measured."""
    return state.held_out.get("loss") if state.held_out.get("step") == state.step else None
