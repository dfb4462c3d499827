"""Checkpoints: everything that a run needs to go on as if it had never stopped, complete or invisible.

``checkpoint-<step>/`` holds ``adapter.safetensors`` (every tensor that ever trains, fp32), ``optimizer.safetensors``,
``state.json``, and ``manifest.json`` with the size and sha256 of each, written when the others are on the disk.
The order of a save: stage, flush the files, manifest, flush, one rename, flush the folder; only then old ones go.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from eulerforge.api import InjectionReport
from eulerforge.config.atomic import staged_folder, write_file
from eulerforge.errors import CheckpointError, RunError
from eulerforge.lora.state import adapter_state, load_adapter_state
from eulerforge.models.stored import widen
from eulerforge.training.diskroom import room_for
from eulerforge.training.manifest import TrainState, read_state, write_manifest, write_state
from eulerforge.training.optimizer import load_optimizer_tensors, optimizer_tensors
from eulerforge.training.rotation import delete_rotated

ADAPTER_FILE = "adapter.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
GO_ON = "then go on with --resume; earlier checkpoints are untouched"


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
    with room_for(folder, tensor_bytes(adapter) + tensor_bytes(moments), hint=f"make room, {GO_ON}"):
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


def refuse_not_finite(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Raises RunError when a tensor holds NaN or infinity: a checkpoint is always one to go on from."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"{folder} was not written: {name} is not finite",
                hint="a smaller training.lr or a longer warm-up usually mends it; --resume goes on from the last one",
            )


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
    widen(model, base)
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


def _loss_at(state: TrainState) -> float | None:
    """The held-out loss of exactly this step, if it was measured."""
    return state.held_out.get("loss") if state.held_out.get("step") == state.step else None
