"""Checkpoints: everything that a run needs to go on as if it had never stopped, complete or invisible.

``checkpoint-<step>/`` holds ``adapter.safetensors`` (every tensor that ever trains, fp32), ``optimizer.safetensors``,
``state.json``, and ``manifest.json`` with the size and sha256 of each, written last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from eulerforge.api import InjectionReport
from eulerforge.config.atomic import STAGING_PREFIX, sha256_of, staged_folder, write_json_atomic
from eulerforge.errors import CheckpointError, RunError
from eulerforge.lora.state import adapter_state
from eulerforge.training.optimizer import load_optimizer_tensors, optimizer_tensors

ADAPTER_FILE = "adapter.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
SCHEMA = 1


@attrs.define(kw_only=True)
class TrainState:
    """How far a run is. ``step`` counts finished optimizer steps; ``seconds`` is time spent in steps.

    ``identity`` says what the run is made of, by configuration key; ``before`` is what was measured of the base.
    """

    step: int = 0
    tokens: int = 0
    label_tokens: int = 0
    seconds: float = 0.0
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
) -> Path:
    """Write ``checkpoint-<step>`` and delete the oldest ones beyond ``keep_last``.

    Raises:
        RunError: the disk is full or not writable.
    """
    folder = out / f"checkpoint-{state.step}"
    try:
        with staged_folder(folder, replace=True) as staging:
            save_file(trained_tensors(model, trained_names), staging / ADAPTER_FILE, metadata={"format": "pt"})
            save_file(optimizer_tensors(optimizer, model), staging / OPTIMIZER_FILE, metadata={"format": "pt"})
            write_state(staging, state)
            write_manifest(staging, "checkpoint", state.step, report)
        if keep_last is not None:
            for old in _folders(out)[keep_last:]:
                _delete(old)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder} could not be written: {error}", hint="make room, then go on with --resume") from error
    return folder


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, trained_names: tuple[str, ...]
) -> TrainState:
    """Put a checkpoint's tensors into the model and the optimizer; give back its state.

    Raises:
        CheckpointError: a tensor is missing, is not expected, or has another shape.
    """
    own = dict(model.named_parameters())
    expected = adapter_state(model).keys() | set(trained_names)
    found = load_file(folder / ADAPTER_FILE)
    wrong = sorted(expected ^ found.keys()) or [name for name in found if found[name].shape != own[name].shape]
    if wrong:
        raise CheckpointError(
            f"{folder} does not fit the model: {len(wrong)} tensors differ, {wrong[0]} first",
            hint="resume with the preset that the run was started with",
        )
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
    load_optimizer_tensors(optimizer, model, load_file(folder / OPTIMIZER_FILE))
    return read_state(folder)


def write_state(folder: Path, state: TrainState) -> None:
    write_json_atomic(folder / STATE_FILE, attrs.asdict(state))


def read_state(folder: Path) -> TrainState:
    """The state of a checkpoint or of ``final``.

    Raises:
        CheckpointError: it is not there or not readable.
    """
    try:
        return TrainState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE_FILE} cannot be read: {error}") from error


def write_manifest(folder: Path, kind: str, step: int, report: InjectionReport) -> None:
    """List every file of ``folder`` with size and hash; the last file to be written."""
    from eulerforge import __version__

    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(STAGING_PREFIX)
    }
    manifest = {"schema": SCHEMA, "kind": kind, "step": step, "eulerforge": __version__, "files": files}
    write_json_atomic(folder / MANIFEST_FILE, {**manifest, "injection": report.to_json()})


def verify(folder: Path) -> Mapping[str, Any]:
    """The manifest of a folder whose files are all there, unchanged.

    Raises:
        CheckpointError: it says which file is wrong and how.
    """
    hint = "use another checkpoint of the run"
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST_FILE}: it is not complete", hint=hint) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST_FILE} cannot be read: {error}", hint=hint) from error
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{folder} has format {manifest.get('schema')}, this version reads {SCHEMA}", hint=hint)
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing", hint=hint)
        if path.stat().st_size != facts["size"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {facts['size']}", hint=hint)
        if sha256_of(path) != facts["sha256"]:
            raise CheckpointError(f"{path} has changed since it was written", hint=hint)
    return manifest


def latest_complete(out: Path, *, say: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint of a run that passes ``verify``; what is skipped on the way is said, with the reason."""
    for folder in _folders(out):
        try:
            verify(folder)
            read_state(folder)
        except CheckpointError as error:
            if say is not None:
                say(f"skipped {folder.name}: {error}")
            continue
        return folder
    return None


def _folders(out: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    found = [path for path in out.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    return sorted(found, key=lambda path: -int(path.name[11:]))


def _delete(folder: Path) -> None:
    """Hide first, then delete: a half-deleted checkpoint is never seen under its name."""
    hidden = folder.with_name(f"{STAGING_PREFIX}deleted-{folder.name}")
    folder.rename(hidden)
    shutil.rmtree(hidden)
