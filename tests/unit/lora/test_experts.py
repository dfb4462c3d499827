"""LoRAExperts against experts whose weights hold the full delta: forward, gradients, dropout, merge, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eulerforge.errors import ModelError
from eulerforge.lora import experts as module_under_test
from eulerforge.lora.experts import LoRAExperts
from eulerforge.lora.merge import merge_in_place
from eulerforge.lora.wrap import adapted_modules, unwrap, wrap_experts
from eulerforge.models.linear_ops import PLAIN
from eulerforge.testing.tiny_models import tiny_config, tiny_model

EXPERTS, HIDDEN, INNER, TOKENS, K = 4, 32, 48, 11, 2
BOTH = ("gate_up_proj", "down_proj")


def base_experts(dtype: torch.dtype = torch.float32, implementation: str = "grouped_mm") -> Any:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    torch.manual_seed(0)
    config = tiny_config("mixtral")
    config._experts_implementation = implementation
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    return experts.to(dtype)


def make(*, dtype: torch.dtype = torch.float32, parameters: tuple[str, ...] = BOTH, **options: Any) -> LoRAExperts:
    layer = LoRAExperts(base_experts(dtype), parameters=parameters, r=4, alpha=8.0, **options)
    for path in layer.paths.values():
        nn.init.normal_(path.lora_B, std=0.2)
    return layer


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, choice and weights; expert 3 is chosen by no token."""
    torch.manual_seed(1)
    index = torch.stack([torch.randperm(EXPERTS - 1)[:K] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, K).softmax(-1).to(dtype).requires_grad_()
    return torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True), index, weights


def reference(
    layer: LoRAExperts, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, low: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Token by token in float64, with the full delta in the weights."""
    full = {name: layer.base_layer.get_parameter(name).double() for name in BOTH}
    for name in layer.paths:
        full[name] = full[name] + low[f"{name}.lora_B"] @ low[f"{name}.lora_A"] * (8.0 / 4)
    rows = []
    for token, chosen, weight in zip(x, index, weights, strict=True):
        outs = []
        for expert, factor in zip(chosen, weight, strict=True):
            gate, up = (full["gate_up_proj"][expert] @ token).chunk(2)
            outs.append(full["down_proj"][expert] @ (F.silu(gate) * up) * factor)
        rows.append(sum(outs))
    return torch.stack(rows)


@pytest.mark.parametrize("loop", [False, True], ids=["grouped", "loop"])
@pytest.mark.parametrize("parameters", [BOTH, ("gate_up_proj",), ("down_proj",)])
def test_forward_and_gradients_equal_the_float64_reference(
    parameters: tuple[str, ...], loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loop:
        monkeypatch.setattr("eulerforge.models.grouped.native", lambda *_: False)
    layer = make(parameters=parameters)
    x, index, weights = inputs()
    out = layer(x, index, weights)
    g = torch.randn_like(out)
    out.backward(g)
    x64, w64 = (tensor.detach().double().requires_grad_() for tensor in (x, weights))
    low = {name: p.detach().double().requires_grad_() for name, p in layer.adapter_parameters()}
    assert set(low) == {f"{name}.{matrix}" for name in parameters for matrix in ("lora_A", "lora_B")}
    wanted = reference(layer, x64, index, w64, low)
    wanted.backward(g.double())
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out.double(), wanted, **close)
    torch.testing.assert_close(x.grad.double(), x64.grad, **close)  # type: ignore[union-attr]
    torch.testing.assert_close(weights.grad.double(), w64.grad, **close)  # type: ignore[union-attr]
    for name, parameter in layer.adapter_parameters():
        torch.testing.assert_close(parameter.grad.double(), low[name].grad, **close)  # type: ignore[union-attr]
        assert not parameter.grad[3].any()  # type: ignore[index]
    assert all(parameter.grad is None for parameter in layer.base_layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_identity_at_the_start_to_the_bit(dtype: torch.dtype) -> None:
    base = base_experts(dtype)
    x, index, weights = inputs(dtype)
    wanted = base(x, index, weights)
    layer = LoRAExperts(base, r=4, alpha=8.0)
    assert torch.equal(layer(x, index, weights), wanted)
    base.config._experts_implementation = "eager"
    torch.testing.assert_close(base(x, index, weights), wanted, rtol=2e-2, atol=2e-2)


def test_shapes_scaling_and_precision() -> None:
    layer = LoRAExperts(base_experts(torch.bfloat16), r=4, alpha=8.0)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.adapter_parameters()}
    assert shapes == {
        "gate_up_proj.lora_A": (EXPERTS, 4, HIDDEN),
        "gate_up_proj.lora_B": (EXPERTS, 2 * INNER, 4),
        "down_proj.lora_A": (EXPERTS, 4, INNER),
        "down_proj.lora_B": (EXPERTS, HIDDEN, 4),
    }
    assert {parameter.dtype for _, parameter in layer.adapter_parameters()} == {torch.float32}
    assert layer.scaling == 2.0
    assert LoRAExperts(base_experts(), r=4, alpha=8.0, use_rslora=True).scaling == 4.0
    bound = math.sqrt(6 / (6 * HIDDEN))
    assert 0.9 * bound < layer.paths["gate_up_proj"].lora_A.abs().max() <= bound
    x, index, weights = inputs(torch.bfloat16)
    out = layer(x, index, weights.float())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.paths["down_proj"].lora_B.grad.dtype == torch.float32  # type: ignore[union-attr]


def test_bf16_gradients_are_near_the_float64_reference() -> None:
    layer = make(dtype=torch.bfloat16)
    x, index, weights = inputs(torch.bfloat16)
    layer(x, index, weights).sum().backward()
    low = {name: p.detach().double().requires_grad_() for name, p in layer.adapter_parameters()}
    reference(layer, x.detach().double(), index, weights.detach().double(), low).sum().backward()
    for name, parameter in layer.adapter_parameters():
        wanted = low[name].grad
        assert (parameter.grad.double() - wanted).norm() < 0.02 * wanted.norm(), name  # type: ignore[union-attr,operator]


def test_dropout_acts_on_the_low_rank_paths_in_training_only() -> None:
    layer = make(dropout=0.5)
    x, index, weights = inputs()
    layer.eval()
    assert torch.equal(layer(x, index, weights), layer(x, index, weights))
    layer.train()
    torch.manual_seed(3)
    first, again = layer(x, index, weights), layer(x, index, weights)
    torch.manual_seed(3)
    assert torch.equal(layer(x, index, weights), first)
    assert not torch.equal(first, again)
    torch.manual_seed(4)
    with torch.no_grad():
        mean = torch.stack([layer(x, index, weights) for _ in range(400)]).mean(0)
        layer.paths["down_proj"].lora_B.zero_()
        wide = torch.stack([layer(x, index, weights) for _ in range(400)]).mean(0)
    assert (mean - wide).norm() > 0.1 * wide.norm()


def test_what_dropout_leaves_is_made_up_for_exactly_in_half_precision() -> None:
    """1 / 0.95 is 1.0547 in bf16, 0.2% too much."""
    layer, exact = (make(dtype=dtype, dropout=0.05).train() for dtype in (torch.bfloat16, torch.float32))
    exact.load_state_dict({name: value.float() for name, value in layer.state_dict().items()})
    x, index, weights = inputs(torch.bfloat16)
    shares = []
    for seed in range(40):
        with torch.no_grad():
            torch.manual_seed(seed)
            got = layer(x, index, weights).double()
            torch.manual_seed(seed)
            wanted = exact(x.float(), index, weights.float()).double()
            plain = layer.base_layer(x, index, weights).double()
        path = wanted - plain
        shares.append(float(((got - plain) * path).sum() / path.square().sum()))
    assert sum(shares) / len(shares) == pytest.approx(1, abs=1e-3)


def test_the_gradients_under_dropout_are_those_of_the_same_mask() -> None:
    layer = make(dropout=0.5).double().train()
    x, index, weights = (tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs())
    tensors = [x.detach(), weights.detach(), *(p.detach() for _, p in layer.adapter_parameters())]
    names = [name for name, _ in layer.adapter_parameters()]

    def run(x: torch.Tensor, weights: torch.Tensor, *adapters: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        replaced = dict(zip(names, adapters, strict=True))
        return torch.func.functional_call(layer, replaced, (x, index, weights))

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in tensors], atol=1e-6)


def test_nothing_of_the_size_of_the_full_delta_is_kept_for_backward() -> None:
    layer = make()
    x, index, weights = inputs()
    own = {parameter.data_ptr() for parameter in layer.parameters()} | {x.data_ptr(), weights.data_ptr()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, index, weights)
    pairs = TOKENS * K
    # what the gate needs, two low-rank rows, the order (int64) of each pair, and where the experts end
    assert sum(kept.values()) == pairs * (4 * 2 * INNER + 2 * 4 * 4 + 8) + 4 * EXPERTS


def test_a_frozen_input_and_frozen_weights_get_no_gradient() -> None:
    layer = make()
    x, index, weights = inputs()
    layer(x.detach(), index, weights.detach()).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for _, parameter in layer.adapter_parameters())  # type: ignore[union-attr]


def test_merge_equals_the_live_layer_and_unwrap_gives_back_the_same_bits() -> None:
    model = tiny_model("mixtral")
    ids = torch.arange(5, 25)[None]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def inject() -> None:
        for layer in range(3):
            generators = {name: torch.Generator().manual_seed(layer) for name in BOTH}
            wrapped = wrap_experts(
                model, f"model.layers.{layer}.mlp.experts", BOTH, r=2, alpha=4, generators=generators
            )
            for path in wrapped.paths.values():
                nn.init.normal_(path.lora_B, std=0.1, generator=torch.Generator().manual_seed(9))

    inject()
    assert unwrap(model) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    inject()
    live = model(ids).logits
    path = model.model.layers[1].mlp.experts.paths["down_proj"]
    wanted = before["model.layers.1.mlp.experts.down_proj"].double() + path.lora_B.double() @ path.lora_A.double() * 2
    assert merge_in_place(model, lambda _: PLAIN) == 3
    assert not list(adapted_modules(model))
    merged = model(ids).logits
    torch.testing.assert_close(merged, live, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.model.layers[1].mlp.experts.down_proj.double(), wanted, rtol=1e-6, atol=1e-6)
    assert model.state_dict().keys() == before.keys()
    assert sum(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()) == 6


def test_a_merge_goes_one_expert_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    whole = module_under_test.ExpertsPath.delta
    monkeypatch.setattr(
        module_under_test.ExpertsPath,
        "delta",
        lambda self, *index: sizes.append((delta := whole(self, *index)).shape) or delta,
    )
    model = nn.Sequential(make())
    merge_in_place(model, lambda _: PLAIN)
    assert sizes == [(1, 2 * INNER, HIDDEN)] * EXPERTS + [(1, HIDDEN, INNER)] * EXPERTS


def test_a_part_of_a_merge_is_that_part_of_the_whole() -> None:
    layer = make()
    base = layer.base_layer.get_parameter("gate_up_proj").detach()
    whole = layer.merged_part("gate_up_proj", base)
    part = (slice(2, 3), slice(INNER, INNER + 5))
    torch.testing.assert_close(layer.merged_part("gate_up_proj", base[part], part), whole[part])


def test_a_meta_model_can_be_wrapped_to_count_parameters() -> None:
    with torch.device("meta"):
        base = base_experts()
    layer = LoRAExperts(base, r=2, alpha=1)
    assert all(parameter.device.type == "meta" for _, parameter in layer.adapter_parameters())


@pytest.mark.parametrize("flag", ["has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel"])
def test_experts_of_another_layout_are_refused_by_name(flag: str) -> None:
    base = base_experts()
    setattr(base, flag, True)
    with pytest.raises(ModelError, match=f"{flag} is True"):
        LoRAExperts(base, r=2, alpha=1)


def test_a_second_injection_and_unknown_parameters_are_refused() -> None:
    with pytest.raises(ModelError, match="adapted already"):
        LoRAExperts(make(), r=2, alpha=1)
    with pytest.raises(ModelError, match="gate_proj"):
        LoRAExperts(base_experts(), parameters=("gate_proj",), r=2, alpha=1)
    with pytest.raises(ValueError, match="at least 1"):
        LoRAExperts(base_experts(), r=0, alpha=1)
