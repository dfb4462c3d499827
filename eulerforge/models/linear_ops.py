"""Reading a linear layer's weight, and the plain layer that a merge puts in its place.

Plain layers, those of ``models/stored.py`` and bitsandbytes' are known here; other formats come through the
``eulerforge_linear_ops`` hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from eulerforge.api import LinearOps
from eulerforge.errors import ModelError, PluginError
from eulerforge.models.quantized import quantized_ops
from eulerforge.models.stored import StoredLinear, StoredOps


class PlainLinearOps:
    """``nn.Linear`` with a floating-point weight."""

    def dequantize(self, module: nn.Module) -> torch.Tensor:
        return module.weight.detach().float()  # type: ignore[operator,union-attr]

    @torch.no_grad()
    def plain(self, module: nn.Module, weight: torch.Tensor) -> nn.Module:
        module.weight.copy_(weight)  # type: ignore[operator,union-attr]
        return module


PLAIN, STORED = PlainLinearOps(), StoredOps()


def linear_ops_from(registry: Any) -> Callable[[nn.Module], LinearOps]:
    """A function from module to its operations: a plugin's answer first, then bitsandbytes', then the plain one.

    Raises (from the function):
        ModelError: no plugin knows the module and it is neither a plain nor a bitsandbytes layer.
        PluginError: a plugin failed over a layer that is not a plain one, and no other knows it.
    """

    def find(module: nn.Module) -> LinearOps:
        try:
            ops: LinearOps | None = registry.linear_ops(module)
        except PluginError:
            if type(module) is not nn.Linear:  # a plain layer is what it is, whatever a plugin thinks of it
                raise
            ops = None
        if ops is None:
            ops = quantized_ops(module)
        if ops is not None:
            return ops
        if isinstance(module, StoredLinear):
            return STORED
        if isinstance(module, nn.Linear) and module.weight.is_floating_point():
            return PLAIN
        raise ModelError(
            f"no plugin knows how to read the weight of a {type(module).__name__}",
            hint="install the plugin that offers this format, or load the base with model.load_precision.mode = bf16",
        )

    return find
