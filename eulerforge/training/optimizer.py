"""AdamW over everything that ever trains, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eulerforge.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from eulerforge.config.schema import TrainingConfig

OPTIMIZER_KEYS = ("exp_avg", "exp_avg_sq", "step")
BLOCKWISE_KEYS = ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2", "step")
"""Of bitsandbytes: moments of 8 bits, the largest value of each block of 256, and what the 8 bits mean.

Parameters below 4096 elements keep their moments in fp32 and have the first two and the step alone.
"""


def make_optimizer(
    model: nn.Module, groups: Mapping[str, Sequence[str]], config: TrainingConfig
) -> torch.optim.Optimizer:
    """One parameter group per phase group, frozen ones included, so that a group's state survives its pauses.

    A parameter without a gradient is not touched by AdamW: neither by the update nor by the weight decay.

    Raises:
        ConfigError: a parameter is not fp32, where small updates would vanish in its rounding, or the optimizer needs
            what is not here.
    """
    parameters = dict(model.named_parameters())
    for group, names in groups.items():
        for name in names:
            if parameters[name].dtype != torch.float32:
                raise ConfigError(
                    f"group {group}: {name} is {str(parameters[name].dtype).removeprefix('torch.')};"
                    " base weights train in fp32 only",
                    key="model.load_precision.mode",
                    hint="--set model.load_precision.mode=fp32 --set model.load_precision.compute_dtype=auto, or take"
                    f" {group} out of training.phases",
                )
    device = next(iter(model.parameters())).device.type
    settings: dict[str, Any] = {
        "params": [{"params": [parameters[name] for name in names], "name": group} for group, names in groups.items()],
        "lr": config.lr,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer != "adamw":
        return _blockwise(config.optimizer, device, settings)
    return torch.optim.AdamW(**settings, fused=device in ("cpu", "cuda"))


def _blockwise(name: str, device: str, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW with moments of 8 bits."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"training.optimizer = {name} needs bitsandbytes: {error}",
            key="training.optimizer",
            hint="pip install 'eulerforge-core[qlora]', or --set training.optimizer=adamw",
        ) from error
    paged = name == "paged_adamw_8bit"
    if paged and device != "cuda":
        raise ConfigError(
            f"training.optimizer = {name} moves its state out of a GPU's memory, and the device is {device}",
            key="training.optimizer",
            hint="--set training.optimizer=adamw_8bit",
        )
    kind = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(**settings)
    return optimizer


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """The rate of the update that follows ``step`` finished ones: linear warm-up, then the schedule.

    ``cosine`` and ``linear`` reach ``min_lr_ratio * lr`` at ``total_steps``; ``constant`` stays at ``lr``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[config.scheduler]
    if config.scheduler == "constant":
        return config.lr
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * max(0.0, shape))


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name and key, on the CPU; parameters that never trained have none."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if key not in {*OPTIMIZER_KEYS, *BLOCKWISE_KEYS}:
                continue
            # bitsandbytes counts steps in a plain number, and all parameters share its two tables of what 8 bits mean
            tensor = torch.as_tensor(value).detach().to("cpu", copy=key in ("qmap1", "qmap2"))
            tensors[f"{names[id(parameter)]}:{key}"] = tensor.contiguous()
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put back what ``optimizer_tensors`` gave; what is not among the tensors starts afresh.

    Raises:
        CheckpointError: the tensors are of another optimizer.
    """
    fresh = getattr(optimizer, "init_state", None)  # bitsandbytes' own, which pages where it should
    places = {id(p): (i, j) for i, group in enumerate(optimizer.param_groups) for j, p in enumerate(group["params"])}
    for name, parameter in model.named_parameters():
        if f"{name}:step" not in tensors:
            continue
        if (f"{name}:state1" in tensors) != (fresh is not None):
            raise CheckpointError(
                f"the optimizer state of {name} was saved by another optimizer",
                hint="resume with the training.optimizer that the run was started with",
            )
        if fresh is not None:
            group, place = places[id(parameter)]
            fresh(optimizer.param_groups[group], parameter, group, place)
            _fill(optimizer.state[parameter], name, tensors)
            continue
        # fused AdamW wants its step counter on the parameter's device
        optimizer.state[parameter] = {
            key: tensors[f"{name}:{key}"].to(parameter.device, copy=True) for key in OPTIMIZER_KEYS
        }


def _fill(state: dict[str, Any], name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy one parameter's saved tensors into its state; shapes and precisions are the optimizer's own."""
    for key in BLOCKWISE_KEYS:
        if key == "step":
            state[key] = int(tensors[f"{name}:{key}"])
        elif key in state:
            state[key].copy_(tensors[f"{name}:{key}"])
