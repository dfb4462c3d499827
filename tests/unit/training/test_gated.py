"""Gated MLPs that keep two of four tensors: their own bits, less memory, and nothing that only looks like one."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from eulerforge.lora.linear import LoRALinear
from eulerforge.training.gated import lean_mlps
from eulerforge.training.memory import KeptForBackward
from eulerforge.training.norms import quicken_norms

WIDTH, WIDE = 16, 48


class MLP(nn.Module):
    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, WIDE, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(WIDE, WIDTH, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Clamped(MLP):
    """Not the product of the two, although it looks like it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.1) * self.up_proj(x))


class Wide(MLP):
    """Code of a model's own that raises what it likes where its layers are narrow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError(x.shape[-1])


class DropsOut(MLP):
    """As Seed-OSS has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(x), p=0.01, training=self.training)


class Pair(MLP):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class Upcast(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).float()


def adapted(mlp: Any, dropout: float = 0.0) -> Any:
    generator = torch.Generator().manual_seed(1)
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = LoRALinear(getattr(mlp, name), r=4, alpha=8, dropout=dropout, generator=generator)
        nn.init.normal_(layer.lora_B, std=0.1, generator=generator)
        setattr(mlp, name, layer)
    return mlp.requires_grad_(True).train()


def frozen_base(mlp: Any) -> Any:
    for name, parameter in mlp.named_parameters():
        parameter.requires_grad_("lora" in name)
    return mlp


def value_and_gradients(mlp: Any, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = mlp(x)
    weights = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *weights])]


def assert_same_bits(lean: Any, plain: Any, x: torch.Tensor) -> None:
    for found, wanted in zip(value_and_gradients(lean, x), value_and_gradients(plain, x), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "gelu"])
def test_every_bit_is_autograds_own(activation: str, dtype: torch.dtype, dropout: float) -> None:
    plain = frozen_base(adapted(MLP(activation).to(dtype), dropout))
    lean = copy.deepcopy(plain)
    assert lean_mlps(lean).count == 1
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert_same_bits(lean, plain, x)


def test_the_gradients_are_the_float64_references() -> None:
    lean = frozen_base(adapted(MLP()))
    exact = copy.deepcopy(lean).double()
    lean_mlps(lean)
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2))

    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        one = getattr(exact, name)
        return x @ (one.weight + one.scaling * one.lora_B @ one.lora_A).T

    def reference(x: torch.Tensor) -> torch.Tensor:
        gate = layer("gate_proj", x)
        return layer("down_proj", gate * torch.sigmoid(gate) * layer("up_proj", x))

    exact.forward = reference
    for found, wanted in zip(value_and_gradients(lean, x), value_and_gradients(exact, x.double()), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.detach().abs().max()))


def bytes_kept(module: Any, x: torch.Tensor) -> int:
    """Of what autograd keeps, without the weights."""
    module(x)  # joins the weights
    counter = KeptForBackward(module)
    with counter.hooks():
        y = module(x)
    assert y.requires_grad
    return counter.bytes


def test_two_wide_tensors_are_kept_where_there_were_four() -> None:
    mlp, rows = frozen_base(adapted(MLP())), 64
    x = torch.randn(rows, WIDTH, requires_grad=True)
    ranks = 3 * 4
    assert bytes_kept(mlp, x) == 4 * rows * (WIDTH + 4 * WIDE + ranks)
    forwards = lean_mlps(mlp)
    assert bytes_kept(mlp, x) == 4 * rows * (WIDTH + 2 * WIDE + ranks)
    forwards.remove()
    assert bytes_kept(mlp, x) == 4 * rows * (WIDTH + 4 * WIDE + ranks)


def test_the_norm_before_it_is_not_kept_either() -> None:
    model = tiny_model("llama").requires_grad_(False)
    norm, mlp = model.model.layers[0].post_attention_layernorm, model.model.layers[0].mlp
    block = nn.Sequential(norm, frozen_base(adapted(mlp)))
    x = torch.randn(64, norm.weight.numel(), requires_grad=True)
    lean_mlps(block)
    own = 2 * mlp.gate_proj.out_features + 3 * 4 + 1  # gate and up, the ranks' columns, the norm's scale
    assert bytes_kept(block, x) == 4 * len(x) * (2 * x.shape[1] + own)
    quicken_norms(block)
    assert bytes_kept(block, x) == 4 * len(x) * (x.shape[1] + own)


def test_an_activation_checkpoint_keeps_the_input_alone() -> None:
    mlp = frozen_base(adapted(MLP(), 0.3))
    lean_mlps(mlp)
    x = torch.randn(64, WIDTH, requires_grad=True)
    given: list[weakref.ref[Any]] = []
    mlp.down_proj.register_forward_pre_hook(lambda _, args: given.append(weakref.ref(args[0].untyped_storage())))
    y = checkpoint(mlp, x, use_reentrant=False)
    assert [storage() for storage in given] == [None]
    y.sum().backward()
    assert x.grad is not None


def test_a_result_that_a_hook_changes_in_place_is_kept_itself() -> None:
    plain = frozen_base(adapted(MLP()))
    plain.down_proj.register_forward_pre_hook(lambda _, given: (given[0].mul_(2),))
    lean = copy.deepcopy(plain)
    lean_mlps(lean)
    x = torch.randn(5, WIDTH)
    assert_same_bits(lean, plain, x)


def test_what_only_looks_like_one_is_left_and_named() -> None:
    model = nn.Sequential(MLP(), Clamped(), Clamped(), MLP("relu2"), Wide())
    assert lean_mlps(model).line() == (
        "gated MLPs: 1 keep two of four tensors; left as they are: 2 Clamped, 1 MLP, 1 Wide"
    )


@pytest.mark.parametrize("kind", [DropsOut, Pair, Upcast])
def test_one_that_does_more_than_the_product_is_left(kind: Any) -> None:
    module = kind().eval()
    before = torch.get_rng_state()
    assert lean_mlps(module).count == 0
    assert not module.training
    assert torch.equal(before, torch.get_rng_state())


def test_hooks_on_the_activation_run_whenever_they_were_set() -> None:
    seen: list[int] = []
    hooked, later = MLP(), MLP()
    hooked.act_fn.register_forward_hook(lambda *_: seen.append(1))
    assert lean_mlps(hooked).count == 0
    assert lean_mlps(later).count == 1
    later.act_fn.register_forward_hook(lambda *_: seen.append(1))
    later(torch.randn(2, WIDTH))
    assert seen == [1]


def test_an_activation_that_was_replaced_is_the_one_that_computes() -> None:
    mlp, x = frozen_base(adapted(MLP())), torch.randn(5, WIDTH)
    lean_mlps(mlp)
    mlp.act_fn = nn.Identity()
    wanted = mlp.down_proj(mlp.gate_proj(x) * mlp.up_proj(x))
    assert torch.equal(mlp(x), wanted)


def test_gate_and_up_of_two_precisions_train_as_they_did() -> None:
    plain = frozen_base(adapted(MLP()))
    plain.up_proj.register_forward_hook(lambda _module, _given, y: y.double())
    plain.down_proj.register_forward_pre_hook(lambda _, given: (given[0].float(),))
    lean = copy.deepcopy(plain)
    lean_mlps(lean)
    x = torch.randn(5, WIDTH)
    assert_same_bits(lean, plain, x)


def test_an_evaluation_and_a_trained_base_take_the_layers_as_they_are() -> None:
    plain = adapted(MLP())
    lean = copy.deepcopy(plain)
    lean_mlps(lean)
    x = torch.randn(5, WIDTH)
    assert_same_bits(lean, plain, x)
    with torch.inference_mode():
        assert torch.equal(lean(x), plain(x))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "qwen3_5"])
def test_every_familys_own_mlp_is_one(family: str) -> None:
    model = tiny_model(family).requires_grad_(False)
    forwards = lean_mlps(model)
    assert (forwards.count, forwards.left) == (len(model.get_decoder().layers), ())
    forwards.remove()
    assert not any("forward" in vars(module) for module in model.modules())
