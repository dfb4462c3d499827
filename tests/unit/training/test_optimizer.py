"""AdamW against its formula in float64, the schedule against its curves, and its state as tensors."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from eulerforge.config.schema import TrainingConfig
from eulerforge.errors import CheckpointError, ConfigError
from eulerforge.training.checkpoint import write_tensors
from eulerforge.training.optimizer import learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors


def config(**changes: object) -> TrainingConfig:
    return TrainingConfig(**{"lr": 0.1, **changes})  # type: ignore[arg-type]


def test_warm_up_is_a_straight_line_that_ends_at_lr() -> None:
    rates = [learning_rate(step, 10, config(warmup_steps=4)) for step in range(4)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert learning_rate(4, 10, config(warmup_steps=4)) == pytest.approx(0.1)


@pytest.mark.parametrize("floor", [0.0, 0.25])
@pytest.mark.parametrize("warmup", [0, 3])
def test_cosine_and_linear_fall_from_lr_to_the_floor(floor: float, warmup: int) -> None:
    total = 11
    for step in range(warmup, total + 1):
        done = (step - warmup) / (total - warmup)
        curves = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}
        for name, curve in curves.items():
            want = 0.1 * floor + 0.1 * (1 - floor) * curve
            got = learning_rate(step, total, config(scheduler=name, warmup_steps=warmup, min_lr_ratio=floor))
            assert got == pytest.approx(want, abs=1e-12)


def test_constant_stays() -> None:
    assert {learning_rate(step, 9, config(scheduler="constant")) for step in range(9)} == {0.1}


def test_a_warm_up_longer_than_the_run_divides_by_nothing() -> None:
    assert learning_rate(2, 3, config(warmup_steps=200)) == pytest.approx(0.1 * 3 / 200)
    assert learning_rate(3, 3, config(warmup_steps=3)) == pytest.approx(0.1)


class Pair(nn.Module):
    """Two named vectors, one per phase group."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.b = nn.Parameter(torch.tensor([3.0]))


GROUPS = {"first": ("a",), "second": ("b",)}


def step(model: Pair, optimizer: torch.optim.Optimizer, **gradients: list[float]) -> None:
    for name, values in gradients.items():
        getattr(model, name).grad = torch.tensor(values)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def test_three_updates_follow_the_paper() -> None:
    """Loshchilov and Hutter, decoupled weight decay, in float64."""
    model = Pair()
    optimizer = make_optimizer(model, GROUPS, config(lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6))
    value, m, v = model.a.detach().double(), torch.zeros(3).double(), torch.zeros(3).double()
    for t, gradient in enumerate(([0.1, 0.2, -3.0], [1.0, -0.2, 0.0], [0.5, 0.5, 0.5]), start=1):
        g = torch.tensor(gradient).double()
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        value = value - 0.01 * 0.1 * value
        value = value - 0.01 * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
        step(model, optimizer, a=gradient)
    torch.testing.assert_close(model.a.detach().double(), value, rtol=1e-6, atol=1e-7)


def test_what_has_no_gradient_does_not_move_and_does_not_decay() -> None:
    model = Pair()
    optimizer = make_optimizer(model, GROUPS, config(weight_decay=0.5))
    step(model, optimizer, a=[1.0, 1.0, 1.0])
    assert model.b.tolist() == [3.0]
    assert [group["name"] for group in optimizer.param_groups] == ["first", "second"]


def test_the_state_as_tensors_and_back_continues_the_same_way() -> None:
    straight = Pair()
    optimizer = make_optimizer(straight, GROUPS, config())
    step(straight, optimizer, a=[1.0, 2.0, 3.0])
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, straight).items()}
    assert set(saved) == {"a:exp_avg", "a:exp_avg_sq", "a:step"}
    assert float(saved["a:step"]) == 1.0
    resumed = Pair()
    resumed.load_state_dict(straight.state_dict())
    other = make_optimizer(resumed, GROUPS, config())
    load_optimizer_tensors(other, resumed, saved)
    for model, own in ((straight, optimizer), (resumed, other)):
        step(model, own, a=[-1.0, 0.5, 0.1], b=[2.0])
    assert torch.equal(straight.a, resumed.a)
    assert torch.equal(straight.b, resumed.b)
    assert float(saved["a:step"]) == 1.0, "the loaded state is a copy"


def test_a_weight_below_fp32_is_refused_by_name() -> None:
    model = Pair()
    model.b.data = model.b.data.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"group second: b is bfloat16") as refused:
        make_optimizer(model, GROUPS, config())
    assert "fp32" in (refused.value.problems[0].hint or "")


class Large(nn.Module):
    """One vector that bitsandbytes keeps in 8 bits, and one that is too small for that."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(64, 128))
        self.b = nn.Parameter(torch.randn(3))


def large_steps(model: Large, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for number in range(first, last):
        random = torch.Generator().manual_seed(number)
        for parameter in (model.a, model.b):
            parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step()


def test_eight_bits_stay_close_to_fp32_and_resume_bit_for_bit() -> None:
    pytest.importorskip("bitsandbytes", reason="the 8-bit optimizers are bitsandbytes' own")
    exact, straight, resumed = Large(), Large(), Large()
    start = exact.a.detach().clone()
    optimizers = [make_optimizer(model, GROUPS, config(optimizer=name, lr=0.01)) for model, name in (
        (exact, "adamw"), (straight, "adamw_8bit"))]  # fmt: skip
    for model, optimizer in zip((exact, straight), optimizers, strict=True):
        large_steps(model, optimizer, 0, 5)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizers[1], straight).items()}
    assert saved["a:state1"].dtype == torch.uint8
    assert saved["b:state1"].dtype == torch.float32
    assert int(saved["a:step"]) == 5
    resumed.load_state_dict(straight.state_dict())
    other = make_optimizer(resumed, GROUPS, config(optimizer="adamw_8bit", lr=0.01))
    load_optimizer_tensors(other, resumed, saved)
    large_steps(straight, optimizers[1], 5, 9)
    large_steps(resumed, other, 5, 9)
    assert torch.equal(straight.a, resumed.a)
    assert torch.equal(straight.b, resumed.b)
    large_steps(exact, optimizers[0], 5, 9)
    assert (straight.a - exact.a).norm().item() < 0.1 * (exact.a - start).norm().item()


def test_the_state_of_two_parameters_in_eight_bits_can_be_written(tmp_path: Path) -> None:
    """bitsandbytes has one table for both, and a safetensors file has no tensor twice."""
    pytest.importorskip("bitsandbytes", reason="the 8-bit optimizers are bitsandbytes' own")
    model = nn.ParameterDict({"a": torch.randn(64, 128), "b": torch.randn(128, 64)})
    optimizer = make_optimizer(model, {"lora": ["a", "b"]}, config(optimizer="adamw_8bit"))
    for parameter in model.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = optimizer_tensors(optimizer, model)
    write_tensors(tmp_path / "optimizer.safetensors", tensors)
    back = load_file(tmp_path / "optimizer.safetensors")
    assert {"a:qmap1", "b:qmap1", "a:state1", "b:state2"} <= set(back)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_the_state_of_another_optimizer_is_refused() -> None:
    pytest.importorskip("bitsandbytes", reason="the 8-bit optimizers are bitsandbytes' own")
    model = Large()
    optimizers = [make_optimizer(model, GROUPS, config(optimizer=name)) for name in ("adamw", "adamw_8bit")]
    for optimizer in optimizers:
        large_steps(model, optimizer, 0, 1)
    for mine, other in (optimizers, optimizers[::-1]):
        with pytest.raises(CheckpointError, match="another optimizer"):
            load_optimizer_tensors(mine, model, optimizer_tensors(other, model))


def test_a_paged_optimizer_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="moves its state out of a GPU") as refused:
        make_optimizer(Large(), GROUPS, config(optimizer="paged_adamw_8bit"))
    assert "adamw_8bit" in (refused.value.problems[0].hint or "")


def test_bitsandbytes_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="needs bitsandbytes") as refused:
        make_optimizer(Large(), GROUPS, config(optimizer="adamw_8bit"))
    assert "eulerforge-core[qlora]" in (refused.value.problems[0].hint or "")
