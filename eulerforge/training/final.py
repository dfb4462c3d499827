"""``final/``: what a finished run leaves.

The whole state dict lies there under the tutorial's keys (``...gate_proj.base_layer.weight``, ``.lora_A``,
``.lora_B``). Notable: transformers would open such a file under the name ``model.safetensors`` and fill what it does
not recognize with random numbers, so the file has another name and no config.json lies beside it.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import nn

from eulerforge.api import InjectionReport
from eulerforge.config.atomic import staged_folder
from eulerforge.training.checkpoint import (
    ADAPTER_FILE,
    GO_ON,
    refuse_not_finite,
    tensor_bytes,
    trained_tensors,
    write_tensors,
)
from eulerforge.training.diskroom import room_for
from eulerforge.training.manifest import TrainState, write_manifest, write_state

FOLDER = "final"
FULL_PATTERN = "model_with_adapters{suffix}.safetensors"
MAX_SHARD = "5GB"
WITHOUT_BASE = f"make room, or --set checkpoint.include_base=false, which leaves the base's weights out, {GO_ON}"


def refuse_no_room(
    out: Path, model: nn.Module, trained_names: tuple[str, ...], *, include_base: bool, freed: int = 0
) -> None:
    """Refuse a run whose ``final`` would not fit on the disk, before it trains; checkpoints need room beside it.

    ``freed`` bytes are those that the run deletes first.

    Raises:
        RunError: with what is needed and what is free.
    """
    parameters = dict(model.named_parameters())
    # without a state dict, which would take apart what the layers have laid out for their products
    kept = [parameters[name] for name in trained_names] + (list(parameters.values()) if include_base else [])
    with room_for(out / FOLDER, max(0, sum(tensor.nbytes for tensor in kept) - freed), hint=WITHOUT_BASE):
        pass


def save_final(
    out: Path,
    state: TrainState,
    model: nn.Module,
    report: InjectionReport,
    trained_names: tuple[str, ...],
    *,
    include_base: bool,
    max_shard: str = MAX_SHARD,
) -> Path:
    """Write ``final``: adapters, state and, with ``include_base``, the full state dict in shards.

    Raises:
        RunError: the disk is full or not writable, or an adapter is not finite.
    """
    folder = out / FOLDER
    adapter = trained_tensors(model, trained_names)
    refuse_not_finite(adapter, folder)
    # by address: tied weights are stored once
    stored = {str(tensor.data_ptr()): tensor for tensor in model.state_dict().values()} if include_base else {}
    with (
        room_for(folder, tensor_bytes(adapter) + tensor_bytes(stored), hint=WITHOUT_BASE),
        staged_folder(folder, replace=True) as staging,
    ):
        write_tensors(staging / ADAPTER_FILE, adapter)
        if include_base:
            save_torch_state_dict(model.state_dict(), staging, filename_pattern=FULL_PATTERN, max_shard_size=max_shard)
        write_state(staging, state)
        write_manifest(staging, FOLDER, state.step, report, run_id=state.run_id)
    return folder
