"""LoRALinear against a five-line float64 reference: forward, gradients, merge, and what it must never change."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from eulerforge.errors import ModelError
from eulerforge.lora.dropout import draw_seed, keep_mask
from eulerforge.lora.linear import LoRALinear
from eulerforge.lora.merge import merge_in_place
from eulerforge.lora.wrap import adapted_modules, unwrap, wrap_linear
from eulerforge.models.linear_ops import PLAIN


def make(r: int = 4, *, bias: bool = True, dtype: torch.dtype = torch.float32, **options: object) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(24, 16, bias=bias, dtype=dtype), r=r, alpha=8.0, **options)  # type: ignore[arg-type]
    nn.init.normal_(layer.lora_B)
    return layer


def reference(layer: LoRALinear, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    base = layer.base_layer
    return x @ base.weight.double().T + (base.bias.double() if base.bias is not None else 0) + x @ A.T @ B.T * (8.0 / 4)


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_equal_the_float64_reference(bias: bool) -> None:
    layer = make(bias=bias)
    x = torch.randn(3, 5, 24, requires_grad=True)
    out = layer(x)
    g = torch.randn_like(out)
    out.backward(g)
    x64 = x.detach().double().requires_grad_()
    A, B = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    wanted = reference(layer, x64, A, B)
    wanted.backward(g.double())
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-6)
    for ours, theirs in ((x.grad, x64.grad), (layer.lora_A.grad, A.grad), (layer.lora_B.grad, B.grad)):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert layer.base_layer.weight.grad is None


def test_it_is_the_identity_at_the_start() -> None:
    base = nn.Linear(24, 16)
    x = torch.randn(2, 24)
    wanted = base(x)
    assert torch.equal(LoRALinear(base, r=4, alpha=8)(x), wanted)


def test_shapes_scaling_and_precision_are_the_tutorials() -> None:
    layer = LoRALinear(nn.Linear(24, 16, dtype=torch.bfloat16), r=4, alpha=8)
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((4, 24), (16, 4))
    assert layer.scaling == 2.0
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer.lora_B.count_nonzero() == 0
    assert layer.lora_A.abs().max() <= math.sqrt(6 / (6 * 24))
    assert layer(torch.randn(2, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert LoRALinear(nn.Linear(4, 4), r=4, alpha=8, use_rslora=True).scaling == 4.0


def test_dropout_acts_on_the_low_rank_path_in_training_only() -> None:
    layer = make(dropout=0.5)
    x = torch.randn(64, 24)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(1)
    kept = keep_mask(x.shape, 0.5, draw_seed(), x.device)
    wanted = layer.base_layer(x) + (x * kept / 0.5) @ layer.lora_A.T @ layer.lora_B.T * 2
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x), wanted)


def test_merge_equals_the_live_layer_and_unwrap_gives_back_the_same_bits() -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for path in ("0", "2"):
        nn.init.normal_(wrap_linear(model, path, r=3, alpha=6).lora_B)
    x = torch.randn(7, 24)
    live = model(x)
    assert unwrap(model) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for path in ("0", "2"):
        torch.manual_seed(0)
        nn.init.normal_(wrap_linear(model, path, r=3, alpha=6).lora_B)
    live = model(x)
    wanted = before["0.weight"].double() + model[0].lora_B.double() @ model[0].lora_A.double() * 2
    assert merge_in_place(model, lambda _: PLAIN) == 2
    assert not list(adapted_modules(model))
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), live, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[0].weight.double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_second_injection_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    wrap_linear(model, "0", r=1, alpha=1)
    with pytest.raises(ModelError, match="adapted already"):
        wrap_linear(model, "0", r=1, alpha=1)


def test_the_initial_values_come_from_the_generator_alone() -> None:
    first, second = (
        LoRALinear(nn.Linear(4, 4), r=2, alpha=1, generator=torch.Generator().manual_seed(5)).lora_A for _ in range(2)
    )
    assert torch.equal(first, second)


def test_a_meta_model_can_be_wrapped_to_count_parameters() -> None:
    with torch.device("meta"):
        base = nn.Linear(8, 8)
    assert LoRALinear(base, r=2, alpha=1).lora_A.device.type == "meta"


@pytest.mark.parametrize("shape", [(3, 24), (2, 3, 24)])
def test_a_result_can_be_changed_in_place_and_derived(shape: tuple[int, ...]) -> None:
    layer, x = make(), torch.randn(shape, requires_grad=True)
    (wanted,) = torch.autograd.grad((layer(x) * 3).sum(), x)
    y = layer(x)
    y.mul_(3)
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_rows_give_no_rows(dropout: float) -> None:
    layer, x = make(dropout=dropout).train(), torch.randn(0, 24, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 16)
    assert layer.lora_A.grad is not None
    assert not layer.lora_A.grad.any()


def test_a_pass_in_inference_mode_leaves_a_layer_that_trains() -> None:
    layer, x = make(), torch.randn(3, 24)
    with torch.inference_mode():
        first = layer(x)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(first, y)
    assert layer.lora_B.grad is not None
