"""Tensors that are computed again in the backward pass instead of kept for it.

Notable: a cheap result (a norm's, a gated product's) is kept by whoever takes it, although what it was made of is kept
anyway. Such a result carries a recipe; who would save it for the backward pass saves the recipe's ingredients in its
place, through ``save_for_backward`` as well, so that activation checkpoints and offloading see them.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch

_NAME = "eulerforge_recipe"


class Maker:
    """Makes the tensor again; what several functions ask for in one backward pass is made once."""

    def __init__(self, make: Callable[..., torch.Tensor]) -> None:
        self._make = make
        self._takers = 0
        self._made: torch.Tensor | None = None

    def expect_taker(self) -> None:
        """One more function will ask; the last one lets the tensor go."""
        self._takers += 1

    def tensor(self, *ingredients: torch.Tensor) -> torch.Tensor:
        made = self._made if self._made is not None else self._make(*ingredients)
        self._takers -= 1
        self._made = made if self._takers > 0 else None
        return made


@attrs.frozen(eq=False)
class Recipe:
    """``maker.tensor(*ingredients)`` is the tensor, bit for bit."""

    maker: Maker
    ingredients: tuple[torch.Tensor, ...]
    _versions: tuple[int, ...]

    def holds(self, y: torch.Tensor) -> bool:
        """Whether ``y`` and what it was made of are as they were; what is written through ``.data`` is not seen."""
        return self._versions == _versions(y, *self.ingredients)

    def taken(self) -> Maker:
        """For who saves the ingredients."""
        self.maker.expect_taker()
        return self.maker


def can_be_made_again(y: torch.Tensor, make: Callable[..., torch.Tensor], *ingredients: torch.Tensor) -> torch.Tensor:
    """``y``, with the recipe ``make(*ingredients)``.

    Args:
        make: gives ``y``'s bits; it must hold no tensor that the ingredients could be.
    """
    if y.requires_grad:
        parts = tuple(tensor.detach() for tensor in ingredients)
        setattr(y, _NAME, Recipe(Maker(make), parts, _versions(y, *parts)))
    return y


def recipe_of(y: torch.Tensor) -> Recipe | None:
    """The recipe of ``y``; None if it has none, or one that holds no more."""
    recipe: Recipe | None = getattr(y, _NAME, None)
    return recipe if recipe is not None and recipe.holds(y) else None


def _versions(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)
