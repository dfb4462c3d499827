"""Fused experts that are stored in half precision, int8 or 4 bits: forward and gradients are those of plain weights.

The reference is transformers' own layer over the weights that the stored ones stand for, to the bit.
"""

from __future__ import annotations

import copy
from typing import Any

import attrs
import pytest
import torch
from tiny import quantize_model, tiny_model
from torch import nn

from eulerforge.config.schema import LoadPrecision
from eulerforge.lora.experts import LoRAExperts
from eulerforge.lora.merge import merge_in_place
from eulerforge.lora.wrap import wrap_experts
from eulerforge.models import experts as module_under_test
from eulerforge.models.experts import DOWN, GATE_UP, StoredExperts, is_known, shape_of, store
from eulerforge.models.linear_ops import PLAIN
from eulerforge.models.quantized import parameter_count, plan_of

CPU = torch.device("cpu")
MODES = {
    "nf4": LoadPrecision(mode="int4", compute_dtype="fp32"),
    "nf4 single": LoadPrecision(mode="int4", double_quant=False, compute_dtype="fp32"),
    "fp4": LoadPrecision(mode="int4", quant_type="fp4", compute_dtype="fp32"),
    "int8": LoadPrecision(mode="int8", compute_dtype="fp32"),
}
FAMILIES = ("mixtral", "qwen3_moe", "qwen3_5_moe")
BOTH = (GATE_UP, DOWN)
TOKENS = 37


def model_of(family: str) -> Any:
    """A tiny mixture whose experts are as wide as 4 bits need, its weights numbers that bf16 holds."""
    inner = {"intermediate_size": 128} if family == "mixtral" else {"moe_intermediate_size": 64}
    model = tiny_model(family, hidden_size=64, head_dim=16, **inner)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def stored_in(form: str, family: str = "mixtral") -> Any:
    """The experts of layer 1 of such a model, stored in this form."""
    model = model_of(family)
    experts = model.model.layers[1].mlp.experts
    assert is_known(experts)
    if form == "bf16":
        store(experts, torch.float32)
        for parameter in experts.parameters():
            parameter.data = parameter.data.bfloat16()
    else:
        plan = plan_of(model, MODES[form], torch.float32)
        assert {f"model.layers.1.mlp.experts.{name}" for name in BOTH} <= set(plan.fused)
        assert not plan.experts
        quantize_model(model, plan, CPU)
    assert isinstance(experts, StoredExperts)
    assert not any(parameter.dtype == torch.float32 for parameter in experts.parameters())
    return experts


FORMS = pytest.mark.parametrize("form", ["bf16", *MODES])


def plain_twin(experts: Any) -> Any:
    twin = copy.deepcopy(experts)
    twin.plain()
    assert type(twin) is type(experts).base_class
    assert {name: tuple(p.shape) for name, p in twin.named_parameters()} == {n: shape_of(experts, n) for n in BOTH}
    assert not list(twin.buffers())
    return twin


def inputs(experts: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, choice and weights; the last expert is chosen by no token."""
    random = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(experts.num_experts - 1, generator=random)[:2] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, 2, generator=random).softmax(-1).requires_grad_()
    return torch.randn(TOKENS, 64, generator=random, requires_grad=True), index, weights


def passed(layer: nn.Module, experts: Any, seed: int = 5) -> list[torch.Tensor]:
    """The layer's output and every gradient."""
    x, index, weights = inputs(experts)
    torch.manual_seed(seed)  # of dropout
    out = layer(x, index, weights)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    trained = [p.grad for p in layer.parameters() if p.requires_grad]
    return [out, x.grad, weights.grad, *trained]


@pytest.mark.parametrize("family", FAMILIES)
@FORMS
def test_the_layer_is_that_of_plain_weights_to_the_bit(form: str, family: str) -> None:
    experts = stored_in(form, family).requires_grad_(False)
    twin = plain_twin(experts).requires_grad_(False)
    for ours, theirs in zip(passed(experts, experts), passed(twin, experts), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("parameters", [BOTH, (GATE_UP,), (DOWN,)], ids="+".join)
@FORMS
def test_adapters_beside_it_are_those_beside_plain_weights_to_the_bit(
    form: str, parameters: tuple[str, ...], dropout: float
) -> None:
    experts = stored_in(form)
    results = []
    for base in (experts, plain_twin(experts)):
        generators = {name: torch.Generator().manual_seed(9) for name in parameters}
        layer = LoRAExperts(base, parameters=parameters, r=4, alpha=8, dropout=dropout, generators=generators)
        random = torch.Generator().manual_seed(3)
        for path in layer.paths.values():
            nn.init.normal_(path.lora_B, std=0.2, generator=random)
        results.append(passed(layer.train(), experts))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_bf16_products_of_a_4_bit_base_are_those_of_its_weights_in_bf16() -> None:
    model = model_of("mixtral").to(torch.bfloat16)
    precision = attrs.evolve(MODES["nf4"], compute_dtype="bf16")
    quantize_model(model, plan_of(model, precision, torch.bfloat16), CPU)
    experts = model.model.layers[0].mlp.experts
    twin = plain_twin(experts)
    assert twin.down_proj.dtype == torch.bfloat16
    x, index, weights = inputs(experts)
    with torch.no_grad():
        args = (x.bfloat16(), index, weights.bfloat16())
        # a processor with bf16 products may add in another order
        torch.testing.assert_close(experts(*args), twin(*args), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("form", ["nf4", "nf4 single", "fp4"])
def test_four_bits_are_those_of_bitsandbytes_for_the_whole_tensor(form: str) -> None:
    """Constants that are quantized twice too: a file that we write is read by bitsandbytes' own function."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

    weight = model_of("mixtral").model.layers[1].mlp.experts.gate_up_proj.detach()
    precision: LoadPrecision = MODES[form]
    experts = stored_in(form)
    packed, state = quantize_4bit(
        weight, compress_statistics=precision.double_quant, quant_type=precision.quant_type, blocksize=64
    )
    assert torch.equal(experts.gate_up_proj.data, packed)
    assert torch.equal(experts.gate_up_proj.quant_state.absmax, state.absmax)
    whole = dequantize_4bit(packed, state)
    assert torch.equal(experts.whole(GATE_UP, torch.float32), whole)
    assert (whole - weight).norm() < 0.15 * weight.norm()
    saved = experts.state_dict()
    parts = {key.removeprefix("gate_up_proj."): v for key, v in saved.items() if key.startswith("gate_up_proj.")}
    reread = QuantState.from_dict(parts, device=CPU)
    assert torch.equal(dequantize_4bit(saved["gate_up_proj"], reread), whole)


def test_int8_is_that_of_bitsandbytes_for_each_expert() -> None:
    from bitsandbytes.functional import int8_vectorwise_quant

    weight = model_of("mixtral").model.layers[1].mlp.experts.down_proj.detach()
    experts = stored_in("int8")
    for expert in range(experts.num_experts):
        rows, scale, _ = int8_vectorwise_quant(weight[expert].half())
        assert torch.equal(experts.down_proj[expert], rows)
        assert torch.equal(experts.down_proj_SCB[expert], scale)
    whole = experts.whole(DOWN, torch.float32)
    assert (whole - weight).norm() < 0.01 * weight.norm()
    assert {"down_proj", "down_proj_SCB"} <= experts.state_dict().keys()


@FORMS
def test_a_merge_gives_transformers_layer_with_weight_and_delta(form: str) -> None:
    model = nn.Module()
    model.experts = stored_in(form)
    whole = {name: model.experts.whole(name, torch.float32) for name in BOTH}
    wrapper = wrap_experts(model, "experts", BOTH, r=4, alpha=8)
    deltas = {}
    for name, path in wrapper.paths.items():
        nn.init.normal_(path.lora_B, std=0.2)
        deltas[name] = path.delta()
    assert merge_in_place(model, lambda _: PLAIN) == 1
    assert type(model.experts).__name__ == "MixtralExperts"
    for name in BOTH:
        assert torch.equal(model.experts.get_parameter(name), whole[name] + deltas[name])


@FORMS
def test_one_expert_is_made_plain_at_a_time(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass makes the weights of all: at 8 experts of Mixtral that is 1.8 GiB."""
    made: list[int] = []
    room = module_under_test.room
    monkeypatch.setattr(
        module_under_test, "room", lambda name, shape, like: made.append(shape[0] * shape[1]) or room(name, shape, like)
    )
    monkeypatch.setattr(StoredExperts, "whole", lambda *_: pytest.fail("all weights were made at once"))
    experts = stored_in(form).requires_grad_(False)
    passed(experts, experts)
    # forward and backward of both, by the experts that have tokens
    assert made == 3 * [256 * 64] + 3 * [64 * 128] + 3 * [64 * 128] + 3 * [256 * 64]


@pytest.mark.parametrize("form", list(MODES))
def test_a_quantized_parameter_counts_the_numbers_that_it_stands_for(form: str) -> None:
    experts = stored_in(form)
    assert sum(parameter_count(parameter) for parameter in experts.parameters()) == 4 * 3 * 64 * 128


def test_the_plan_of_mixtral_in_4_bits() -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MixtralConfig(), dtype=torch.bfloat16)
    plan = plan_of(model, LoadPrecision(mode="int4"), torch.bfloat16)
    plan.refuse("Mixtral-8x7B")
    (line,) = plan.lines()
    assert line.startswith(
        "int4 (nf4, double quantization): 128 linear layers and 64 fused expert tensors, 86.50 GiB in"
    )
    assert "become 22.31 GiB" in line


def test_what_cannot_be_known_is_left_alone() -> None:
    """Another class that holds three dimensions, and flags that say another layout."""
    other = nn.Module()
    other.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 2))
    other.down_proj = nn.Parameter(torch.zeros(2, 2, 2))
    assert not is_known(other)
    experts = model_of("mixtral").model.layers[0].mlp.experts
    assert is_known(experts)
    for flag in ("has_bias", "is_transposed"):
        changed = copy.deepcopy(experts)
        setattr(changed, flag, True)
        assert not is_known(changed), flag
    assert not is_known(stored_in("nf4"))


def test_no_tokens_are_no_rows() -> None:
    experts = stored_in("bf16")
    nothing = experts(torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert nothing.shape == (0, 64)


def test_an_adapters_own_tensors_are_no_experts_that_cannot_be_quantized() -> None:
    """Else a run that fails for memory would not be told of int4."""
    model = model_of("mixtral")
    wrap_experts(model, "model.layers.1.mlp.experts", BOTH, r=4, alpha=8)
    plan = plan_of(model, LoadPrecision(mode="int4"), torch.float32)
    assert not plan.experts
    assert "model.layers.1.mlp.experts.base_layer.gate_up_proj" in plan.fused


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: this checks bitsandbytes' CUDA kernels")
@pytest.mark.parametrize("whole", [True, False], ids=["all-at-once", "one-at-a-time"])
@FORMS
def test_on_cuda_the_layer_is_that_of_plain_weights(form: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "WHOLE_BYTES", module_under_test.WHOLE_BYTES if whole else 0)
    on_cpu = stored_in(form).requires_grad_(False)
    experts = copy.deepcopy(on_cpu).to("cuda")
    twin = plain_twin(on_cpu).requires_grad_(False).to("cuda")
    x, index, weights = (tensor.detach().to("cuda") for tensor in inputs(on_cpu))
    results = []
    for layer in (experts, twin):
        states = x.clone().requires_grad_()
        out = layer(states, index, weights)
        out.backward(torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out))
        results.append((out, states.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
