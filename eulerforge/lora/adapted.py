"""The base of every wrapper that a strategy puts around a module, and of those around a linear one.

Merging, saving and unwrapping know these classes alone, so a third party's wrapper is merged and saved like our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import nn

from eulerforge.errors import ModelError

Index: TypeAlias = tuple[slice, ...]
"""A part of a tensor: slices of its first dimensions, one each; empty is the whole."""


class AdaptedModule(nn.Module):
    """A frozen module ``base_layer`` with trainable parameters beside it.

    A subclass adds its parameters as attributes or in submodules of its own, and defines ``forward``,
    ``changed_parameters`` and ``merged_part``.
    """

    merges_in_parts = True
    """Whether ``merged_part`` takes a part of a tensor; with False it is called with the whole tensor alone."""

    trains_base = True
    """Whether ``forward`` gives the parameters of ``base_layer`` their gradient, where a phase trains them."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if isinstance(base_layer, AdaptedModule):
            raise ModelError(
                "the module is adapted already: a second injection would train two adapters on top of each other",
                hint="unwrap or merge the first adapter, or inject once",
            )
        self.base_layer = base_layer
        base_layer.requires_grad_(False)

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of all that was added, the base layer left out."""
        for name, parameter in self.named_parameters():
            if not name.startswith("base_layer."):
                yield name, parameter

    def release(self) -> nn.Module:
        """The base layer as it was before it was wrapped; a subclass that lays its weight out anew undoes that here."""
        return self.base_layer

    @property
    def changed_parameters(self) -> tuple[str, ...]:
        """The names in ``base_layer`` of the parameters that a merge changes."""
        raise NotImplementedError

    def merged_part(self, name: str, base: torch.Tensor, index: Index = ()) -> torch.Tensor:
        """What a merge makes of ``base_layer``'s parameter ``name``, or of a part of it.

        Args:
            base: fp32, the parameter's own values at ``index``.
            index: which part it is; always empty unless ``merges_in_parts``.

        Returns:
            fp32, same shape.
        """
        raise NotImplementedError


class AdaptedLinear(AdaptedModule):
    """A frozen linear module ``base_layer`` with trainable parameters beside it.

    A subclass adds its parameters as direct attributes and defines ``forward`` and ``merged_weight``.
    """

    merges_in_parts = False

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features = int(base_layer.in_features)  # type: ignore[arg-type]
        self.out_features = int(base_layer.out_features)  # type: ignore[arg-type]

    @property
    def weight(self) -> torch.Tensor:
        """The base weight, because model code sometimes asks a projection for its dtype or device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def changed_parameters(self) -> tuple[str, ...]:
        return ("weight",)

    def merged_part(self, name: str, base: torch.Tensor, index: Index = ()) -> torch.Tensor:
        return self.merged_weight(base)

    def merged_weight(self, base_weight: torch.Tensor) -> torch.Tensor:
        """The weight of a plain linear module that computes the same.

        Args:
            base_weight: fp32, shape (out_features, in_features).

        Returns:
            fp32, same shape.
        """
        raise NotImplementedError
