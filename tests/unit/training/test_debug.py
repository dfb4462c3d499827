"""--debug: the list of what trains, and how far each group moves."""

from __future__ import annotations

import re

import torch
from torch import nn

from eulerforge.training.debug import GroupNorms, trainable_lines
from eulerforge.training.phases import Phase, PhasePlan

PLAN = PhasePlan((Phase(0, ("one", "two")),), {"one": ("a.weight",), "two": ("b.weight", "b.bias")})


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(2, 4)})


def test_every_tensor_that_trains_by_group() -> None:
    assert trainable_lines(model(), PLAN) == [
        "one: 1 tensors, 6 parameters",
        "  a.weight  (2, 3)  float32",
        "two: 2 tensors, 12 parameters",
        "  b.weight  (4, 2)  float32",
        "  b.bias  (4,)  float32",
    ]


def test_norms_are_those_of_the_whole_group() -> None:
    net = model()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    before = {name: parameter.detach().double() for name, parameter in net.named_parameters()}
    norms = GroupNorms(net, PLAN, ("one", "two"))
    torch.optim.SGD(net.parameters(), lr=0.5).step()
    net.zero_grad(set_to_none=True)
    after = {name: parameter.detach().double() for name, parameter in net.named_parameters()}
    lines = norms.lines()
    assert len(lines) == 2
    for line, (group, names) in zip(lines, PLAN.groups.items(), strict=True):
        found = re.match(
            rf"  {group}: gradient norm (\S+) \(after clipping\), update norm (\S+), weight norm (\S+)", line
        )
        assert found is not None
        count = sum(before[name].numel() for name in names)
        moved = torch.cat([(after[name] - before[name]).flatten() for name in names]).norm()
        size = torch.cat([after[name].flatten() for name in names]).norm()
        want = [2.0 * count**0.5, float(moved), float(size)]
        torch.testing.assert_close([float(text) for text in found.groups()], want, rtol=1e-4, atol=0)


def test_a_group_without_gradient_has_norm_zero() -> None:
    norms = GroupNorms(model(), PLAN, ("one",))
    assert norms.lines()[0].startswith("  one: gradient norm 0.0000e+00 (after clipping), update norm 0.0000e+00")
