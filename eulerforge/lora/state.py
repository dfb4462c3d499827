"""The adapters' tensors by name, and back into a model, strictly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from eulerforge.errors import CheckpointError
from eulerforge.lora.wrap import adapted_modules


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every adapter tensor by its full name (``model.layers.0.mlp.gate_proj.lora_A``), detached, not copied."""
    return {
        f"{path}.{name}": parameter.detach()
        for path, module in adapted_modules(model)
        for name, parameter in module.adapter_parameters()
    }


def load_adapter_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy adapter tensors into a model that was injected in the same way.

    Raises:
        CheckpointError: a tensor is missing, is not expected, or has another shape.
    """
    own = adapter_state(model)
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(
            f"the adapter does not fit the model: {len(missing)} tensors are missing, {len(extra)} are not expected"
            f" (first: {(missing or extra)[0]})",
            hint="use the preset that the adapter was trained with: same targets, same layers",
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise CheckpointError(
                f"the adapter tensor {name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}",
                hint="use the preset that the adapter was trained with: same lora_r",
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
