"""AdamW over everything that ever trains, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from eulerforge.errors import ConfigError

if TYPE_CHECKING:
    from eulerforge.config.schema import TrainingConfig

OPTIMIZER_KEYS = ("exp_avg", "exp_avg_sq", "step")


def make_optimizer(model: nn.Module, groups: Mapping[str, Sequence[str]], config: TrainingConfig) -> torch.optim.AdamW:
    """One parameter group per phase group, frozen ones included, so that a group's state survives its pauses.

    A parameter without a gradient is not touched by AdamW: neither by the update nor by the weight decay.

    Raises:
        ConfigError: a parameter is not fp32; small updates would vanish in its rounding.
    """
    parameters = dict(model.named_parameters())
    for group, names in groups.items():
        for name in names:
            if parameters[name].dtype != torch.float32:
                raise ConfigError(
                    f"group {group}: {name} is {str(parameters[name].dtype).removeprefix('torch.')};"
                    " base weights train in fp32 only",
                    key="model.load_precision.mode",
                    hint=f"--set model.load_precision.mode=fp32, or take {group} out of training.phases",
                )
    return torch.optim.AdamW(
        [{"params": [parameters[name] for name in names], "name": group} for group, names in groups.items()],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=next(iter(model.parameters())).device.type in ("cpu", "cuda"),
    )


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
    return {
        f"{names[id(parameter)]}:{key}": value.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if key in OPTIMIZER_KEYS
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put back what ``optimizer_tensors`` gave; what is not among the tensors starts afresh."""
    for name, parameter in model.named_parameters():
        if f"{name}:step" not in tensors:
            continue
        # fused AdamW wants its step counter on the parameter's device
        optimizer.state[parameter] = {
            key: tensors[f"{name}:{key}"].to(parameter.device, copy=True) for key in OPTIMIZER_KEYS
        }
