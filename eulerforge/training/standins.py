"""Modules that stand where decoder layers stood, for a pass in which these are not computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Through(nn.Module):
    """Stands where a layer stood and gives what it is given; whatever else is asked of it is the layer's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


@contextmanager
def standing_in(layers: Any, instead: Mapping[int, nn.Module]) -> Iterator[None]:
    """Put modules in the places of some layers, and the layers back afterwards."""
    real = {at: layers[at] for at in instead}
    try:
        for at, module in instead.items():
            layers[at] = module
        yield
    finally:
        for at, layer in real.items():
            layers[at] = layer
