"""Tensors that are made again: the same bits, once for all who ask, and never of something that has changed."""

from __future__ import annotations

import torch

from eulerforge.models.again import can_be_made_again, recipe_of


def test_what_several_functions_ask_for_is_made_once_and_let_go_with_the_last() -> None:
    calls = []

    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x * 2

    x = torch.ones(3, requires_grad=True)
    recipe = recipe_of(can_be_made_again(x * 2, double, x))
    assert recipe is not None
    maker = recipe.taken()
    assert recipe.taken() is maker
    first = maker.tensor(*recipe.ingredients)
    assert torch.equal(first, torch.full((3,), 2.0))
    assert maker.tensor(*recipe.ingredients) is first
    assert calls == [1]
    assert maker._made is None
    assert maker.tensor(*recipe.ingredients) is not first  # a second backward pass over a kept graph


def test_the_recipe_holds_no_graph() -> None:
    x = torch.ones(3, requires_grad=True) * 1
    recipe = recipe_of(can_be_made_again(x * 2, torch.add, x, x))
    assert recipe is not None
    assert not any(tensor.requires_grad for tensor in recipe.ingredients)


def test_a_result_that_was_changed_in_place_has_no_recipe() -> None:
    x = torch.ones(3, requires_grad=True)
    y = can_be_made_again(x * 2, torch.add, x, x)
    y *= 3
    assert recipe_of(y) is None


def test_a_result_whose_ingredient_was_changed_in_place_has_none() -> None:
    x = torch.ones(3, requires_grad=True) * 1
    y = can_be_made_again(x * 2, torch.add, x, x)
    assert recipe_of(y) is not None
    with torch.no_grad():
        x.mul_(3)
    assert recipe_of(y) is None


def test_what_wants_no_gradient_has_none() -> None:
    with torch.inference_mode():
        y = can_be_made_again(torch.ones(3) * 2, torch.add, torch.ones(3), torch.ones(3))
    assert recipe_of(y) is None
    assert recipe_of(torch.ones(3)) is None
