"""A base that is quantized while it is read: never whole in memory, the same bits, and the same refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import quantize_model, save_tiny

from eulerforge.config.schema import LoadPrecision, ModelConfig, RunConfig
from eulerforge.errors import ModelError
from eulerforge.models import streamed
from eulerforge.models.load import load_model
from eulerforge.models.quantized import plan_of

CPU = torch.device("cpu")
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 128},
    "gemma3_multimodal": {"intermediate_size": 128},
    "mixtral": {"intermediate_size": 128},
    "qwen3_moe": {"intermediate_size": 128, "moe_intermediate_size": 64},
}


def saved(folder: Path, family: str = "llama", **changes: Any) -> Path:
    return save_tiny(folder, family, hidden_size=64, head_dim=16, **SIZES[family], **changes)


def run_config(folder: Path, mode: str = "int4") -> RunConfig:
    compute = "fp32" if mode.startswith("int") else "auto"
    precision = LoadPrecision(mode=mode, compute_dtype=compute)
    return RunConfig(model_name=str(folder), model=ModelConfig(load_precision=precision))


@pytest.mark.parametrize("mode", ["int4", "int8"])
@pytest.mark.parametrize("family", SIZES)
def test_it_has_the_bits_of_a_model_that_is_quantized_after_loading(family: str, mode: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, family)
    plain = load_model(run_config(folder, "fp32"), device=CPU)
    quantize_model(plain.model, plan_of(plain.model, LoadPrecision(mode=mode), torch.float32), CPU)
    found = load_model(run_config(folder, mode), device=CPU).model
    ours, theirs = found.state_dict(), plain.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [type(module) for module in found.modules()] == [type(module) for module in plain.model.modules()]


def test_one_weight_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When one is quantized, those that come later are not in memory yet, and those before are quantized."""
    seen: list[str] = []
    quantize = streamed.quantize_parameter

    def watched(model: Any, name: str, weight: torch.Tensor, plan: Any, device: torch.device) -> Any:
        own = dict(model.named_parameters())
        assert all(own[later].is_meta for later in plan.parameters - set(seen))
        assert all(own[before].dtype == torch.uint8 for before in seen)
        seen.append(name)
        return quantize(model, name, weight, plan, device)

    monkeypatch.setattr(streamed, "quantize_parameter", watched)
    load_model(run_config(saved(tmp_path, "mixtral")), device=CPU)
    assert len(seen) == 3 * (4 + 2)


@pytest.mark.parametrize("family", ["llama", "gemma3_multimodal"])
def test_it_leaves_no_trace_on_the_model(family: str, tmp_path: Path) -> None:
    """Else a config that is saved would name a quantizer that nobody else has."""
    folder = saved(tmp_path, family)
    model = load_model(run_config(folder), device=CPU).model
    plain = load_model(run_config(folder, "fp32"), device=CPU).model
    assert model.config.to_dict() == plain.config.to_dict()
    assert vars(model).keys() == vars(plain).keys()
    assert vars(model.config).keys() == vars(plain.config).keys()
    assert vars(model.config.get_text_config()).keys() == vars(plain.config.get_text_config()).keys()


def changed(folder: Path, name: str, tensor: torch.Tensor | None) -> Path:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    assert name in tensors
    del tensors[name]
    save_file({**tensors, **({} if tensor is None else {name: tensor})}, path, {"format": "pt"})
    return folder


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"
FAULTS: dict[str, tuple[str, torch.Tensor | None, str]] = {
    "missing": (UP, None, f"1 tensors are missing and 0 have another shape, {UP} first"),
    "another shape": (UP, torch.zeros(96, 64), f"0 tensors are missing and 1 have another shape, {UP} first"),
    "not a number": (UP, torch.full((128, 64), float("nan")), f"1 tensors hold NaN or infinity, {UP} first"),
    "a norm missing": (NORM, None, f"1 tensors are missing and 0 have another shape, {NORM} first"),
    "a norm of another shape": (NORM, torch.ones(32), f"0 tensors are missing and 1 have another shape, {NORM} first"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", ["int4", "int8"])
def test_a_damaged_weight_is_refused_by_its_name(mode: str, fault: str, tmp_path: Path) -> None:
    name, tensor, said = FAULTS[fault]
    folder = changed(saved(tmp_path), name, tensor)
    with pytest.raises(ModelError, match=re.escape(said)):
        load_model(run_config(folder, mode), device=CPU)


def test_an_expert_that_is_not_a_number_is_found_too(tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    folder = changed(saved(tmp_path, "mixtral"), name, torch.full((128, 64), float("inf")))
    with pytest.raises(ModelError, match=r"1 tensors hold NaN .*layers\.1\.mlp\.experts\.gate_up_proj first"):
        load_model(run_config(folder), device=CPU)


def test_what_quantizing_raises_is_not_made_a_message_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads it must know that memory ran out; and nothing more is read, which would be put there unquantized."""
    tried: list[str] = []

    def fails(_: Any, name: str, *__: Any) -> Any:
        tried.append(name)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.75 GiB")

    monkeypatch.setattr(streamed, "quantize_parameter", fails)
    with pytest.raises(torch.OutOfMemoryError, match=r"1\.75 GiB"):
        load_model(run_config(saved(tmp_path)), device=CPU)
    assert len(tried) == 1


def test_a_long_load_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "EVERY", -1.0)
    said: list[str] = []
    load_model(run_config(saved(tmp_path)), device=CPU, say=said.append)
    assert [line for line in said if line.startswith("quantized ")][-1] == "quantized 21 of 21 weights"


def test_int8_refuses_a_number_that_fp16_cannot_hold(tmp_path: Path) -> None:
    """bitsandbytes quantizes from fp16: the scale of the row would be infinite, and every output not a number."""
    weight = torch.zeros(128, 64)
    weight[3, 5] = 1e5
    folder = changed(saved(tmp_path), UP, weight)
    load_model(run_config(folder, "int4"), device=CPU)
    with pytest.raises(ModelError, match=rf"1 tensors hold NaN or infinity, {re.escape(UP)} first"):
        load_model(run_config(folder, "int8"), device=CPU)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    folder = changed(saved(tmp_path / "mixture", "mixtral"), name, weight)
    with pytest.raises(
        ModelError, match=r"1 tensors hold NaN or infinity, model\.layers\.1\.mlp\.experts\.gate_up_proj "
    ):
        load_model(run_config(folder, "int8"), device=CPU)


@pytest.mark.parametrize("shared", ["alias", "layer", "weight"])
def test_a_model_that_uses_a_weight_twice_is_quantized_after_loading(
    shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As code that comes with a model may: transformers would take the other name for a tensor that is missing."""
    from transformers import LlamaForCausalLM

    begin = LlamaForCausalLM.__init__

    def sharing(own: Any, *arguments: Any, **keywords: Any) -> None:
        begin(own, *arguments, **keywords)
        layers = own.model.layers
        if shared == "layer":
            layers[2] = layers[0]
        elif shared == "alias":
            layers[0].mlp.alias = layers[0].mlp.up_proj
        else:
            layers[0].mlp.up_proj.weight = layers[0].mlp.gate_proj.weight

    folder = saved(tmp_path)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)  # the tensor under both names, as its author may save it
    save_file({**tensors, "model.layers.0.mlp.alias.weight": tensors[UP.replace("1", "0")].clone()}, path)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", sharing)
    model = load_model(run_config(folder), device=CPU).model
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Int4Linear"
    with torch.no_grad():
        assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_a_module_that_was_imported_anew_loads_too(tmp_path: Path) -> None:
    """As in a notebook that reloads what changed: the name of the quantizer is taken then, by the module before."""
    config = run_config(saved(tmp_path))
    for _ in range(2):
        streamed._registered.cache_clear()
        assert load_model(config, device=CPU).model
