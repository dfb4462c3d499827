"""What ``--debug`` shows of the trainable tensors: names, shapes, dtypes, and how far each group moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from eulerforge.training.phases import PhasePlan


def trainable_lines(model: nn.Module, plan: PhasePlan) -> list[str]:
    """One line per tensor that ever trains, by group."""
    parameters = dict(model.named_parameters())
    lines = []
    for group, names in plan.groups.items():
        count = sum(parameters[name].numel() for name in names)
        lines.append(f"{group}: {len(names)} tensors, {count:,} parameters")
        for name in names:
            tensor = parameters[name]
            lines.append(f"  {name}  {tuple(tensor.shape)}  {str(tensor.dtype).removeprefix('torch.')}")
    return lines


class GroupNorms:
    """Gradient and update norms of each group in one step: made before the update, read after it."""

    def __init__(self, model: nn.Module, plan: PhasePlan, groups: Sequence[str]) -> None:
        parameters = dict(model.named_parameters())
        self._groups = {group: [parameters[name] for name in plan.groups.get(group, ())] for group in groups}
        self._before = {group: [p.detach().clone() for p in found] for group, found in self._groups.items()}
        self._gradients = {
            group: _norm([p.grad for p in found if p.grad is not None]) for group, found in self._groups.items()
        }

    def lines(self) -> list[str]:
        """One line per group; to be called after the update."""
        lines = []
        for group, found in self._groups.items():
            moved = [p.detach() - old for p, old in zip(found, self._before[group], strict=True)]
            lines.append(
                f"  {group}: gradient norm {self._gradients[group]:.4e} (after clipping), update norm"
                f" {_norm(moved):.4e}, weight norm {_norm([p.detach() for p in found]):.4e}"
            )
        return lines


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(list(tensors))) if tensors else 0.0
