"""Quantized bases: what is quantized, that gradients and merges are those of the dequantized weights, and refusals."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import quantize_model, save_tiny, tiny_model
from torch import nn

from eulerforge.config.schema import LoadPrecision, ModelConfig, RunConfig
from eulerforge.errors import ModelError
from eulerforge.lora.linear import LoRALinear
from eulerforge.lora.merge import merge_in_place
from eulerforge.lora.product import low_rank
from eulerforge.lora.wrap import wrap_linear
from eulerforge.models.linear_ops import linear_ops_from
from eulerforge.models.load import load_model
from eulerforge.models.quantized import (
    QuantizationPlan,
    parameter_count,
    plan_of,
    quantized_ops,
)
from eulerforge.plugins import load_registry

OPS = linear_ops_from(load_registry())
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
MODES = {
    "nf4": LoadPrecision(mode="int4", compute_dtype="fp32"),
    "nf4 single": LoadPrecision(mode="int4", double_quant=False, compute_dtype="fp32"),
    "fp4": LoadPrecision(mode="int4", quant_type="fp4", compute_dtype="fp32"),
    "int8": LoadPrecision(mode="int8", compute_dtype="fp32"),
}
QUANTIZED = pytest.mark.parametrize("precision", MODES.values(), ids=MODES)
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def quantized_modules(model: nn.Module) -> int:
    """How many layers of the model are quantized."""
    return sum(quantized_ops(module) is not None for module in model.modules())


def quantized(precision: LoadPrecision, family: str = "llama", device: torch.device = CPU, **changes: Any) -> nn.Module:
    """A tiny model with its decoder's linear layers quantized, and every one of them checked to be so."""
    model = tiny_model(family, **SIZES, **changes).to(_dtype(precision))
    plan = plan_of(model, precision, _dtype(precision))
    quantize_model(model, plan, device)
    assert quantized_modules(model) == len(plan.layers) > 0
    return model.to(device)


def _dtype(precision: LoadPrecision) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision.compute_dtype]


def quantized_layer(linear: nn.Linear, precision: LoadPrecision) -> Any:
    """One layer by itself, as a run quantizes it."""
    model = nn.Sequential(linear)
    sizes = dict.fromkeys(("layer_bytes", "quantized_bytes", "expert_bytes", "other_bytes"), 0)
    none: dict[str, Any] = {"fused": (), "unfit": {}, "experts": ()}
    plan = QuantizationPlan(precision=precision, dtype=_dtype(precision), layers=("0",), **none, **sizes)
    quantize_model(model, plan, CPU)
    return model[0]


def dequantized_twin(model: nn.Module) -> nn.Module:
    """The same model in plain layers that hold the dequantized weights: the reference."""
    twin = tiny_model(model.config.model_type.replace("gemma3_text", "gemma3"), **SIZES)
    weights = {
        f"{path}.weight": OPS(module).dequantize(module)
        for path, module in model.named_modules()
        if quantized_ops(module) is not None
    }
    plain = {name: p for name, p in model.named_parameters() if name not in weights}
    twin.load_state_dict({**plain, **weights})
    return twin


def with_adapters(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    random = torch.Generator().manual_seed(3)
    for index in range(len(model.model.layers)):
        for target in TARGETS:
            made = wrap_linear(model, f"model.layers.{index}.{target}", r=4, alpha=8, generator=random)
            nn.init.normal_(made.lora_B, std=0.05, generator=random)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(1)).to(model.lm_head.weight.device)
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.requires_grad}


def evaluate(model: nn.Module, length: int = 7) -> torch.Tensor:
    ids = torch.arange(5, 5 + length).unsqueeze(0)
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits.float()


@QUANTIZED
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_after_an_eval_forward_gradients_are_those_of_the_dequantized_model(
    precision: LoadPrecision, family: str
) -> None:
    model = quantized(precision, family)
    reference = with_adapters(dequantized_twin(model))
    with_adapters(model)
    for length in (1, 7):  # a single token takes another kernel
        torch.testing.assert_close(evaluate(model, length), evaluate(reference, length), rtol=1e-5, atol=1e-6)
    expected = gradients(reference)
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert len(found) == 2 * len(TARGETS) * len(model.model.layers)
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


@QUANTIZED
@pytest.mark.parametrize("columns", [128, 96])  # 96: a block of 64 reaches over the end of a row
def test_a_weight_is_dequantized_in_parts_as_at_once(
    precision: LoadPrecision, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eulerforge.models import quantized_linear

    torch.manual_seed(0)
    layer = quantized_layer(nn.Linear(columns, 50, bias=False), precision)
    monkeypatch.setattr(quantized_linear, "PART", 7 * columns)
    for dtype in (torch.float32, torch.bfloat16):
        wide = torch.full((50, columns + 3), 9.0, dtype=dtype)
        layer.dequantize_into(wide[:, :columns])
        torch.testing.assert_close(wide[:, :columns], layer.dequantized(dtype), rtol=0, atol=0)
        assert (wide[:, columns:] == 9).all()
        assert (layer.dequantized(dtype).float() - OPS(layer).dequantize(layer)).abs().max() <= 2**-8


@pytest.mark.parametrize("mode", ["int4", "int8"])
def test_one_rounding_keeps_the_small_updates_of_a_quantized_base_too(mode: str) -> None:
    """As of a plain base (``test_product.py``): base and path of a bf16 layer are one product on the CPU."""
    torch.manual_seed(0)
    plain = nn.Linear(64, 512, bias=False, dtype=torch.bfloat16)
    base = quantized_layer(plain, LoadPrecision(mode=mode, compute_dtype="bf16"))
    layer = LoRALinear(base, r=4, alpha=8)
    nn.init.normal_(layer.lora_B, std=0.004)
    x = torch.randn(4000, 64).bfloat16()
    with torch.no_grad():
        weight = base.dequantized(torch.bfloat16).float()
        exact = F.linear(x.float(), weight + layer.delta())
        one = layer(x).float() - exact
        two = (base(x) + low_rank(x, layer.lora_A, layer.lora_B, layer.scaling, 0.0)).float() - exact
    assert float(one.square().mean()) < 0.7 * float(two.square().mean())


@QUANTIZED
def test_the_trap_is_real_and_closed(precision: LoadPrecision) -> None:
    """An eval forward leaves the stored weight as it was, bit for bit."""
    model = quantized(precision)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@QUANTIZED
def test_the_dequantized_weight_is_near_the_original(precision: LoadPrecision) -> None:
    original = tiny_model(**SIZES).model.layers[1].mlp.gate_proj.weight.detach()
    layer = quantized(precision).model.layers[1].mlp.gate_proj
    weight = quantized_ops(layer).dequantize(layer)
    assert weight.shape == original.shape == (128, 64)
    assert weight.dtype == torch.float32
    error = float((weight - original).norm() / original.norm())
    assert 0 < error < (0.01 if precision.mode == "int8" else 0.15)


@QUANTIZED
def test_a_merge_adds_the_delta_to_the_dequantized_weight_and_leaves_plain_layers(precision: LoadPrecision) -> None:
    model = with_adapters(quantized(precision))
    adapted = {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    base = {path: OPS(module.base_layer).dequantize(module.base_layer) for path, module in adapted.items()}
    live = evaluate(model)
    assert merge_in_place(model, OPS) == len(adapted)
    for path, module in adapted.items():
        plain = model.get_submodule(path)
        assert type(plain) is nn.Linear
        assert not plain.weight.requires_grad
        delta = module.delta()
        error = (plain.weight - base[path] - delta).norm() / delta.norm()
        assert error < 1e-3, path
    torch.testing.assert_close(evaluate(model), live, rtol=1e-4, atol=1e-5)


def test_quantizing_a_merged_weight_again_would_lose_what_was_learned() -> None:
    """Why a merge never goes back into 4 bits: the test above would not hold."""
    weight = tiny_model(**SIZES).model.layers[0].mlp.gate_proj.weight.detach()
    delta = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    delta *= 0.005 * weight.norm() / delta.norm()
    model = quantized(MODES["nf4"])
    layer = model.model.layers[0].mlp.gate_proj
    merged = OPS(layer).dequantize(layer) + delta
    holder = tiny_model(**SIZES)
    holder.model.layers[0].mlp.gate_proj.weight.data.copy_(merged)
    quantize_model(holder, plan_of(holder, MODES["nf4"], torch.float32), CPU)
    again = holder.model.layers[0].mlp.gate_proj
    assert (OPS(again).dequantize(again) - merged).norm() / delta.norm() > 0.2


def test_a_bias_passes_through_quantization_and_merge() -> None:
    for precision in MODES.values():
        model = quantized(precision, attention_bias=True)
        layer = model.model.layers[0].self_attn.q_proj
        nn.init.normal_(layer.bias)
        x = torch.randn(3, 64)
        expected = F.linear(x, OPS(layer).dequantize(layer), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        plain = OPS(layer).plain(layer, OPS(layer).dequantize(layer))
        torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)


@QUANTIZED
def test_what_stays_is_not_cast_up(precision: LoadPrecision) -> None:
    import attrs

    model = quantized(attrs.evolve(precision, compute_dtype="bf16"))
    floats = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
    assert set(floats.values()) == {torch.bfloat16}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= floats.keys()
    assert type(model.lm_head) is nn.Linear
    assert evaluate(model).isfinite().all()


@QUANTIZED
def test_parameters_are_counted_as_numbers_not_bytes(precision: LoadPrecision) -> None:
    expected = sum(p.numel() for p in tiny_model(**SIZES).parameters())
    assert sum(parameter_count(p) for p in quantized(precision).parameters()) == expected


@QUANTIZED
def test_a_plan_counts_what_is_then_there(precision: LoadPrecision) -> None:
    plan = plan_of(tiny_model(**SIZES), precision, torch.float32)
    model = quantized(precision)
    layers = {path: model.get_submodule(path) for path in plan.layers}
    held = sum(
        tensor.numel() * tensor.element_size()
        for layer in layers.values()
        for name, tensor in layer.state_dict().items()
        if not name.endswith(("quant_map", "weight_format")) and "quant_state" not in name
    )
    assert plan.quantized_bytes == pytest.approx(held, rel=0.01)
    plain = sum(p.numel() * 4 for p in tiny_model(**SIZES).parameters())
    assert plan.layer_bytes + plan.other_bytes == plain
    assert not plan.experts


def test_layers_that_do_not_fit_are_named() -> None:
    """Qwen3.5's gates have few outputs: bitsandbytes' kernels refuse them."""
    model = tiny_model("qwen3_5", **SIZES, linear_key_head_dim=16, linear_value_head_dim=16)
    plan = plan_of(model, MODES["nf4"], torch.float32)
    assert {name for name, _, _ in plan.unfit} == {"in_proj_a", "in_proj_b"}
    assert not any("in_proj_a" in path or "in_proj_b" in path or "conv1d" in path for path in plan.layers)
    (line,) = [line for line in plan.lines() if line.startswith("not quantized")]
    assert "in_proj_a (2 of 4 x 64)" in line
    quantize_model(model, plan, CPU)
    assert evaluate(model).isfinite().all()


@pytest.mark.parametrize("family", ["gemma3_multimodal", "qwen3_5_multimodal"])
def test_a_vision_tower_is_left_alone(family: str) -> None:
    sizes = {**SIZES, "head_dim": 16}
    plan = plan_of(tiny_model(family, **sizes), MODES["nf4"], torch.float32)
    assert plan.layers
    assert all("language_model.layers." in path for path in plan.layers)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen3_5_moe"])
def test_experts_that_do_not_fit_are_refused_with_their_size_before_loading(tmp_path: Path, family: str) -> None:
    inner = {"intermediate_size": 48} if family == "mixtral" else {"moe_intermediate_size": 24}
    folder = save_tiny(tmp_path, family, hidden_size=64, head_dim=16, **inner)
    (folder / "model.safetensors").write_bytes(b"no weights: a refusal must come before they are read")
    with pytest.raises(ModelError, match="int4 does not reach the experts") as caught:
        load_model(run_config(folder, MODES["nf4"]), device=CPU)
    (problem,) = caught.value.problems
    assert problem.key == "model.load_precision.mode"
    assert "mlp.experts.down_proj first, stay fp32 and take" in problem.message
    assert "in_features that are no multiple of 64" in problem.message
    assert "allow_unquantized_experts=true" in str(problem.hint)


def test_experts_that_do_not_fit_are_loaded_and_announced_when_allowed(tmp_path: Path) -> None:
    import attrs

    folder = save_tiny(tmp_path, "mixtral", hidden_size=64, head_dim=16)
    said: list[str] = []
    precision = attrs.evolve(MODES["nf4"], allow_unquantized_experts=True)
    loaded = load_model(run_config(folder, precision), device=CPU, say=said.append)
    parameters = dict(loaded.model.named_parameters())
    assert parameters["model.layers.0.mlp.experts.down_proj"].dtype == torch.float32
    assert parameters["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.uint8
    size = sum(p.numel() * 4 for name, p in parameters.items() if name.endswith(".experts.down_proj"))
    assert any(f"take {size / 2**20:.1f} MiB" in line for line in said)


def test_a_folder_loads_quantized_and_says_what_it_did(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, **SIZES)
    said: list[str] = []
    loaded = load_model(run_config(folder, MODES["nf4"]), device=CPU, say=said.append)
    assert quantized_modules(loaded.model) == 3 * 7
    assert loaded.dtype == torch.float32
    assert not loaded.model.training
    assert said[0].startswith("int4 (nf4, double quantization): 21 linear layers, ")
    torch.testing.assert_close(evaluate(loaded.model), evaluate(quantized(MODES["nf4"])))


def test_a_model_that_nothing_fits_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no linear layer that int4 fits") as caught:
        load_model(run_config(save_tiny(tmp_path), MODES["nf4"]), device=CPU)
    assert "in_features of 64" in str(caught.value.problems[0].hint)


def test_without_bitsandbytes_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match="quantized bases need bitsandbytes") as caught:
        load_model(run_config(save_tiny(tmp_path, **SIZES), MODES["int8"]), device=CPU)
    assert "pip install 'eulerforge-core[qlora]'" in str(caught.value.problems[0].hint)


def test_a_base_that_is_stored_quantized_is_refused(tmp_path: Path) -> None:
    import json

    folder = save_tiny(tmp_path, **SIZES)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is stored quantized already"):
        load_model(run_config(folder, MODES["int8"]), device=CPU)


def test_a_quantized_model_can_be_copied() -> None:
    for precision in MODES.values():
        model = quantized(precision)
        torch.testing.assert_close(evaluate(copy.deepcopy(model)), evaluate(model))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: this checks bitsandbytes' CUDA kernels")
@QUANTIZED
def test_on_cuda_gradients_are_those_of_the_dequantized_model(precision: LoadPrecision) -> None:
    device = torch.device("cuda", 0)
    model = quantized(precision, device=device)
    reference = with_adapters(dequantized_twin(model).to(device))
    with_adapters(model)
    expected = gradients(reference)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


def run_config(folder: Path, precision: LoadPrecision) -> RunConfig:
    return RunConfig(model_name=str(folder), model=ModelConfig(load_precision=precision))
