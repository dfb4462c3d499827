"""The base of every wrapper that a strategy puts around a linear module.

Merging, saving and unwrapping know this class alone, so a third party's wrapper is merged and saved like our own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from eulerforge.errors import ModelError


class AdaptedLinear(nn.Module):
    """A frozen linear module ``base_layer`` with trainable parameters beside it.

    A subclass adds its parameters as direct attributes and defines ``forward`` and ``merged_weight``.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if isinstance(base_layer, AdaptedLinear):
            raise ModelError(
                "the module is adapted already: a second injection would train two adapters on top of each other",
                hint="unwrap or merge the first adapter, or inject once",
            )
        self.base_layer = base_layer
        base_layer.requires_grad_(False)
        self.in_features = int(base_layer.in_features)  # type: ignore[arg-type]
        self.out_features = int(base_layer.out_features)  # type: ignore[arg-type]

    @property
    def weight(self) -> torch.Tensor:
        """The base weight, because model code sometimes asks a projection for its dtype or device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of all that was added, the base layer left out."""
        for name, parameter in self.named_parameters():
            if not name.startswith("base_layer."):
                yield name, parameter

    def merged_weight(self, base_weight: torch.Tensor) -> torch.Tensor:
        """The weight of a plain linear module that computes the same.

        Args:
            base_weight: fp32, shape (out_features, in_features).

        Returns:
            fp32, same shape.
        """
        raise NotImplementedError
