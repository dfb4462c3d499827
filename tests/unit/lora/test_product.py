"""The fused products against five plain lines: loss and gradients, dropout 0 and seeded, precision, recomputation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from eulerforge.lora.dropout import draw_seed, keep_mask, keep_share
from eulerforge.lora.linear import LoRALinear
from eulerforge.lora.product import augmented, low_rank
from eulerforge.lora.wrap import unwrap, wrap_linear

IN, OUT, R, SCALE = 24, 16, 4, 2.0


def tensors(dtype: torch.dtype = torch.float64, rows: tuple[int, ...] = (3, 5)) -> list[torch.Tensor]:
    """x, A, B, W, bias; the first three want gradients."""
    torch.manual_seed(0)
    x, A, B = torch.randn(*rows, IN, dtype=dtype), torch.randn(R, IN, dtype=dtype), torch.randn(OUT, R, dtype=dtype)
    return [t.requires_grad_() for t in (x, A, B)] + [torch.randn(OUT, IN, dtype=dtype), torch.randn(OUT, dtype=dtype)]


def joined(W: torch.Tensor) -> torch.Tensor:
    return torch.cat([W, torch.full((OUT, R), float("nan"), dtype=W.dtype)], dim=1)


def slow(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """The low-rank path in plain lines, with the mask that ``seed`` means."""
    if dropout:
        rows = x.reshape(-1, IN)
        x = (rows * keep_mask(rows.shape, dropout, seed, rows.device) / keep_share(dropout)).view(x.shape)
    return x @ A.T @ B.T * SCALE


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("filled", [False, True])
def test_both_products_equal_the_plain_lines(dropout: float, dtype: torch.dtype, bias: bool, filled: bool) -> None:
    x, A, B, W, b = tensors(dtype)
    weight = (lambda out: out.copy_(W)) if filled else joined(W)
    torch.manual_seed(4)
    seed = draw_seed()
    g = torch.randn(3, 5, OUT, dtype=dtype)
    for fast in (True, False):
        torch.manual_seed(4)
        got = augmented(x, A, B, weight, b if bias else None, SCALE, dropout) if fast else F.linear(x, W)
        got = got if fast else got + low_rank(x, A, B, SCALE, dropout)
        want = F.linear(x, W, b if bias and fast else None) + slow(x, A, B, dropout, seed)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        ours, theirs = torch.autograd.grad(got, (x, A, B), g), torch.autograd.grad(want, (x, A, B), g)
        for mine, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1), (0, 2)])
@pytest.mark.parametrize("filled", [False, True])
def test_gradcheck_whatever_is_frozen(dropout: float, frozen: tuple[int, ...], filled: bool) -> None:
    x, A, B, W, b = tensors(rows=(4,))
    weight = (lambda out: out.copy_(W)) if filled else joined(W)
    inputs = [t.requires_grad_(at not in frozen) for at, t in enumerate((x, A, B))]

    def fast(*three: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(4)
        return augmented(*three, weight, b, SCALE, dropout)  # type: ignore[misc]

    def path(*three: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(4)
        return low_rank(*three, SCALE, dropout)  # type: ignore[misc]

    assert torch.autograd.gradcheck(fast, inputs)
    assert torch.autograd.gradcheck(path, inputs)


def test_one_rounding_keeps_the_small_updates_that_two_lose() -> None:
    """An update of a quarter of a bf16 step, seen by the mean over many rows as the fp32 result has it."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 512, bias=False), r=4, alpha=8)
    nn.init.normal_(layer.lora_B, std=0.004)
    half = LoRALinear(nn.Linear(64, 512, bias=False, dtype=torch.bfloat16), r=4, alpha=8)
    half.base_layer.weight.data.copy_(layer.base_layer.weight)
    layer.base_layer.weight.data.copy_(half.base_layer.weight)
    half.lora_A.data.copy_(layer.lora_A)
    half.lora_B.data.copy_(layer.lora_B)
    x = torch.randn(4000, 64).bfloat16()
    with torch.no_grad():
        exact = layer(x.float())
        one = half(x).float() - exact
        two = (half.base_layer(x) + low_rank(x, half.lora_A, half.lora_B, half.scaling, 0.0)).float() - exact
    assert float(one.square().mean()) < 0.7 * float(two.square().mean())


class Block(nn.Module):
    """Two projections that read one input, and one that reads what they made."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(IN, 32), nn.Linear(IN, 32, bias=False), nn.Linear(32, IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def wrapped_block(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = Block().to(dtype)
    for path in ("gate", "up", "down"):
        nn.init.normal_(wrap_linear(model, path, r=R, alpha=8, dropout=dropout).lora_B, std=0.1)
    return model


def gradients(model: nn.Module, x: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    x = x.detach().requires_grad_()
    out = checkpoint(model, x, use_reentrant=False) if options.get("again") else model(x)
    out.square().sum().backward()
    return {"x": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}  # type: ignore[dict-item]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_an_activation_checkpoint_gives_the_same_bits(dropout: float) -> None:
    model, x = wrapped_block(dropout), torch.randn(6, IN)
    plain, again = gradients(model, x), gradients(model, x, again=True)
    assert len(plain) == 7
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    if dropout:
        torch.manual_seed(8)
        assert not torch.equal(plain["up.lora_A"], gradients(wrapped_block(0.0), x)["up.lora_A"])


def test_two_passes_before_one_backward_give_the_sum_of_both() -> None:
    model, (first, second) = wrapped_block(), torch.randn(2, 6, IN)
    apart = [gradients(model, x)["down.lora_A"].clone() for x in (first, second)]
    model.zero_grad()
    (model(first).square().sum() + model(second).square().sum()).backward()
    torch.testing.assert_close(model.down.lora_A.grad, apart[0] + apart[1])


def test_an_update_between_forward_and_backward_is_refused_by_autograd() -> None:
    model = wrapped_block()
    loss = model(torch.randn(6, IN)).square().sum()
    with torch.no_grad():
        model.up.lora_B.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_every_change_of_the_adapter_is_seen_by_the_next_pass() -> None:
    """``.data`` leaves no trace in a version counter: a copy of B that trusted one would be stale."""
    model, x = wrapped_block(), torch.randn(6, IN)
    before = model(x)
    model.up.lora_B.data.mul_(2)
    fresh = copy.deepcopy(model)
    assert not torch.equal(model(x), before)
    assert torch.equal(model(x), fresh(x))


def test_autocast_takes_the_plain_way() -> None:
    model, x = wrapped_block(), torch.randn(6, IN)
    want = model(x).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x).float()
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_a_view_that_nobody_sees(dtype: torch.dtype, tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    model = wrapped_block(dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    x = torch.randn(6, IN, dtype=dtype)
    out = model(x)
    weight = model.gate.base_layer.weight
    # with the rank's columns, rows filled up to a multiple of 8
    assert weight.untyped_storage().nbytes() == 32 * (IN + 8) * weight.element_size(), "the weight lives once"
    assert [name for name, _ in model.named_parameters()] == names
    save_file(model.state_dict(), tmp_path / "all.safetensors")
    saved = load_file(tmp_path / "all.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in before)
    assert torch.equal(model(x), out), "the pass after a save joins again"
    unwrap(model)
    for name, tensor in model.state_dict().items():
        was = before[name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")]
        assert tensor.is_contiguous()
        assert torch.equal(tensor, was)
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("rank", [4, 8, 20])
def test_whatever_the_rank_a_row_begins_where_a_gpu_has_fast_kernels(rank: int) -> None:
    layer = LoRALinear(nn.Linear(64, 48, dtype=torch.bfloat16), r=rank, alpha=8)
    x = torch.randn(6, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.base_layer(x))
    assert layer.weight.stride(0) * layer.weight.element_size() % 16 == 0
    assert layer.weight.stride(0) < 64 + rank + 8


def test_a_move_a_cast_and_a_replaced_weight_are_followed() -> None:
    model, x = wrapped_block(), torch.randn(6, IN)
    model(x)
    model.double()
    assert model.gate.base_layer.weight.is_contiguous()
    torch.testing.assert_close(model(x.double()).float(), wrapped_block()(x), rtol=1e-5, atol=1e-5)
    model.gate.base_layer.weight.data = torch.zeros(32, IN, dtype=torch.float64)
    assert float(model.gate(x.double() * 0).detach().sub(model.gate.bias).abs().max()) == 0
    model.gate.base_layer.weight.data.fill_(1.0)
    twin = wrapped_block().double()
    nn.init.ones_(twin.gate.base_layer.weight)
    assert torch.equal(model.gate(x.double()), twin.gate(x.double()))


def test_a_phase_that_trains_the_base_gets_its_gradient_and_a_contiguous_weight() -> None:
    model, x = wrapped_block(), torch.randn(6, IN)
    model(x)
    weight = model.up.base_layer.weight.requires_grad_()
    assert not weight.is_contiguous()
    loss = model(x).square().sum()
    assert weight.is_contiguous()
    loss.backward()
    plain = Block()
    unwrap_state = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if "lora" not in name}
    plain.load_state_dict(unwrap_state)
    for path in ("gate", "up", "down"):
        layer = getattr(model, path)
        getattr(plain, path).weight.data += layer.delta()
    plain(x).square().sum().backward()
    torch.testing.assert_close(weight.grad, plain.up.weight.grad, rtol=1e-4, atol=1e-4)
    weight.requires_grad_(False)
    torch.testing.assert_close(model(x).square().sum(), loss)
    assert not weight.is_contiguous()


def test_hooks_on_the_base_layer_still_run() -> None:
    model, x, seen = wrapped_block(), torch.randn(6, IN), []
    want = model(x)
    model.up.base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x), want)
    assert seen == [1]


def test_kept_for_backward_are_the_input_the_ranks_columns_and_a_bit_of_mask() -> None:
    layer = wrapped_block(0.3).gate
    kept: list[torch.Tensor] = []
    x = torch.randn(50, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    sizes = sorted(t.numel() for t in kept if t.data_ptr() not in (layer.lora_A.data_ptr(), layer.lora_B.data_ptr()))
    assert sizes == [50 * IN // 8, 50 * R, 50 * IN]
