"""Put a wrapper in the place of a module, and take it out again: a pair side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from eulerforge.lora.adapted import AdaptedModule
from eulerforge.lora.experts import LoRAExperts
from eulerforge.lora.linear import LoRALinear


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path`` (``model.layers.0.mlp.gate_proj``) in place of what is there."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def wrap_linear(
    model: nn.Module,
    path: str,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    use_rslora: bool = False,
    generator: torch.Generator | None = None,
) -> LoRALinear:
    """Wrap the linear module at ``path`` in place and give back the wrapper.

    Raises:
        ModelError: the module is wrapped already.
    """
    base_layer = model.get_submodule(path)
    wrapper = LoRALinear(base_layer, r=r, alpha=alpha, dropout=dropout, use_rslora=use_rslora, generator=generator)
    wrapper.train(base_layer.training)
    replace_module(model, path, wrapper)
    return wrapper


def wrap_experts(
    model: nn.Module,
    path: str,
    parameters: Sequence[str],
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    use_rslora: bool = False,
    generators: Mapping[str, torch.Generator] | None = None,
) -> LoRAExperts:
    """Wrap the fused experts at ``path`` in place, a low-rank path beside each of ``parameters``.

    Raises:
        ModelError: the module is wrapped already, or its experts have a layout that is not known.
    """
    base_layer = model.get_submodule(path)
    wrapper = LoRAExperts(
        base_layer,
        parameters=parameters,
        r=r,
        alpha=alpha,
        dropout=dropout,
        use_rslora=use_rslora,
        generators=generators,
    )
    wrapper.train(base_layer.training)
    replace_module(model, path, wrapper)
    return wrapper


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedModule]]:
    """Path and wrapper of every adapted module, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedModule):
            yield path, module


def unwrap(model: nn.Module) -> int:
    """Put every base layer back, unchanged to the bit; give back how many there were."""
    found = list(adapted_modules(model))
    for path, module in found:
        replace_module(model, path, module.release())
    return len(found)
