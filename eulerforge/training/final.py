"""``final/``: what a finished run leaves.

The whole state dict lies there under the tutorial's keys (``...gate_proj.base_layer.weight``, ``.lora_A``,
``.lora_B``). Notable: transformers would open such a file under the name ``model.safetensors`` and fill what it does
not recognize with random numbers, so the file has another name and no config.json lies beside it.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from eulerforge.api import InjectionReport
from eulerforge.config.atomic import staged_folder
from eulerforge.errors import RunError
from eulerforge.training.checkpoint import (
    ADAPTER_FILE,
    TrainState,
    trained_tensors,
    write_manifest,
    write_state,
)

FOLDER = "final"
FULL_PATTERN = "model_with_adapters{suffix}.safetensors"
MAX_SHARD = "5GB"


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
        RunError: the disk is full or not writable.
    """
    folder = out / FOLDER
    try:
        with staged_folder(folder, replace=True) as staging:
            save_file(trained_tensors(model, trained_names), staging / ADAPTER_FILE, metadata={"format": "pt"})
            if include_base:
                # tied weights are stored once, as transformers does
                save_torch_state_dict(
                    model.state_dict(), staging, filename_pattern=FULL_PATTERN, max_shard_size=max_shard
                )
            write_state(staging, state)
            write_manifest(staging, FOLDER, state.step, report)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{folder} could not be written: {error}",
            hint="make room, or --set checkpoint.include_base=false; then --resume writes it from the last checkpoint",
        ) from error
    return folder
