"""A bf16 checkpoint on a processor without bf16 products: half the memory of fp32 weights, and the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tinyrun
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, write_rows

from eulerforge.api import StrategySpec
from eulerforge.cli.main import main
from eulerforge.export.rundir import open_run
from eulerforge.lora.merge import merge_in_place
from eulerforge.models import processor
from eulerforge.models import stored as stored_weights
from eulerforge.models.experts import StoredExperts
from eulerforge.models.linear_ops import linear_ops_from
from eulerforge.models.stored import StoredLinear
from eulerforge.plugins import load_registry
from eulerforge.testing.tiny_models import FAMILIES
from eulerforge.training.receipt import read_receipt
from eulerforge_strategy_dense_lora import plugin

REGISTRY = load_registry()
AUTO = {"model__load_precision__mode": "auto"}
CHANGES: dict[str, Any] = {
    "backbone": "auto",
    "injection__lora_dropout": 0.1,
    "injection__attn_lora__keywords": ["q_proj", "v_proj"],
    "training__max_train_steps": 3,
    "training__batch_size": 4,
    "data__validation__size": 4,
    "evaluation__samples": 0,
}


@pytest.fixture(autouse=True)
def _no_products_of_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies fp32 alone, whichever the tests run on."""
    monkeypatch.setattr(processor, "has_products", lambda half: False)


def prepared(folder: Path, family: str = "llama3", dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Path:
    """A tiny model whose file has this precision, and rows."""
    base = save_tiny(folder / "base", family, **sizes)
    for path in base.glob("*.safetensors"):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    write_rows(folder / "rows.jsonl", 24)
    return folder


def stored(model: Any) -> dict[str, StoredLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, StoredLinear)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_has_the_bits_of_fp32_weights(family: str, tmp_path: Path) -> None:
    prepared(tmp_path, family)
    for mode in ("auto", "fp32"):
        changes = {**CHANGES, "model__load_precision__mode": mode, "output_dir": str(tmp_path / mode)}
        assert main(tinyrun.arguments(tmp_path, **changes)) == 0
    ours, theirs = (load_file(tmp_path / mode / "final" / "adapter.safetensors") for mode in ("auto", "fp32"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert tinyrun.metrics(tmp_path / "auto") == tinyrun.metrics(tmp_path / "fp32")
    facts = [read_receipt(tmp_path / mode)["stored"] for mode in ("auto", "fp32")]
    assert facts[0]["dtype"] == "bf16"
    assert facts[0]["layers"] > 0
    assert (facts[0]["left"], facts[1]) == (0, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_the_loaded_model_is_that_of_an_fp32_one(family: str, tmp_path: Path) -> None:
    """The scale that Gemma 3 computes for its embedding too, which is no weight and would be rounded to bf16."""
    prepared(tmp_path, family)
    run = tinyrun.assembled(tmp_path, **CHANGES, **AUTO)
    wide = tinyrun.assembled(tmp_path, **CHANGES, model__load_precision__mode="fp32")
    layers = stored(run.model)
    kept = {f"{path}.weight": module.weight for path, module in layers.items()}
    experts = {path: m for path, m in run.model.named_modules() if isinstance(m, StoredExperts)}
    kept |= {f"{path}.{name}": weight for path, m in experts.items() for name, weight in m.named_parameters()}
    assert (len(kept), len(kept) - len(layers)) == (run.stored.count, run.stored.fused)
    assert bool(experts) == ("moe" in family or family == "mixtral")
    assert len(layers) > 0
    assert all(weight.dtype == torch.bfloat16 for weight in kept.values())
    assert run.stored.bytes == sum(weight.nbytes for weight in kept.values())
    theirs = dict(wide.model.named_parameters()) | dict(wide.model.named_buffers())
    for name, tensor in (*run.model.named_parameters(), *run.model.named_buffers()):
        assert name in kept or tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.to(theirs[name].dtype), theirs[name]), name


def test_the_run_says_what_it_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(tmp_path)
    assert main(tinyrun.arguments(tmp_path, **CHANGES, **AUTO)) == 0
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if "linear layers stay bf16" in line]
    assert len(lines) == 1
    assert lines[0].endswith("and are multiplied in fp32")


def test_the_file_may_be_fp16_too(tmp_path: Path) -> None:
    prepared(tmp_path, dtype=torch.float16)
    run = tinyrun.assembled(tmp_path, **CHANGES, **AUTO)
    assert {module.weight.dtype for module in stored(run.model).values()} == {torch.float16}
    assert run.dtype == torch.float32


def test_numbers_that_bf16_cannot_hold_stay_fp32(tmp_path: Path) -> None:
    """One layer of the file in fp32: nothing of it may be rounded on the way, and the run says that it is one."""
    prepared(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name] = tensors[name].float() * 1.001
    save_file(tensors, path, {"format": "pt"})
    run = tinyrun.assembled(tmp_path, **CHANGES, **AUTO)
    assert run.stored.left == 1
    assert "; 1 hold numbers that it cannot hold and are fp32" in run.stored.line()
    weight = run.model.get_submodule(name.removesuffix(".weight")).weight
    assert torch.equal(weight, tensors[name])


def test_an_fp32_file_is_loaded_as_it_is(tmp_path: Path) -> None:
    tinyrun.prepare(tmp_path)
    run = tinyrun.assembled(tmp_path, **CHANGES, **AUTO)
    assert run.stored is None
    assert not stored(run.model)


def test_a_named_half_is_stored_and_not_multiplied(tmp_path: Path) -> None:
    """``mode = bf16``, as a preset for a card has it: it ran 30 times slower here, number by number."""
    tinyrun.prepare(tmp_path)
    run = tinyrun.assembled(tmp_path, **CHANGES, model__load_precision__mode="bf16")
    assert run.dtype == torch.float32
    assert {module.weight.dtype for module in stored(run.model).values()} == {torch.bfloat16}
    assert not run.warnings
    asked = {"model__load_precision__mode": "bf16", "model__load_precision__compute_dtype": "bf16"}
    assert tinyrun.assembled(tmp_path, **CHANGES, **asked).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["int4", "int8"])
def test_a_base_to_quantize_passes_through_memory_as_its_file_has_it(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of what fp32 takes, for the same numbers; a layer whose shape no quantization fits is stored so too."""
    from eulerforge.models import load

    prepared(tmp_path, hidden_size=64, intermediate_size=96, head_dim=16)
    asked: list[torch.dtype] = []
    read = load._read
    monkeypatch.setattr(
        load, "_read", lambda run, source, dtype, how: asked.append(dtype) or read(run, source, dtype, how)
    )
    changes = {**CHANGES, "model__load_precision__mode": mode}
    assert main(tinyrun.arguments(tmp_path, **changes)) == 0
    monkeypatch.setattr(load, "storage_of", lambda *settings: None)
    assert main(tinyrun.arguments(tmp_path, **{**changes, "output_dir": str(tmp_path / "wide")})) == 0
    assert asked == [torch.bfloat16, torch.float32]
    ours, theirs = (load_file(tmp_path / run / "final" / "adapter.safetensors") for run in ("run", "wide"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert tinyrun.metrics(tmp_path / "run") == tinyrun.metrics(tmp_path / "wide")
    facts = read_receipt(tmp_path / "run")["stored"]
    assert (facts["dtype"], facts["layers"]) == ("bf16", 3)  # down_proj of each layer: 96 columns are no whole blocks


def test_what_a_phase_trains_is_fp32_and_comes_back_as_it_was_trained(tmp_path: Path) -> None:
    prepared(tmp_path)
    phases = [{"step": 0, "trainable": ["lora", "attn_lora", "base_ffn"]}]
    changes = {**CHANGES, **AUTO, "training__phases": phases, "training__scheduler": "constant"}
    assert main(tinyrun.arguments(tmp_path, **changes)) == 0
    facts = read_receipt(tmp_path / "run")["stored"]
    assert facts["trained"] > 0
    trained = open_run(tmp_path / "run", registry=REGISTRY, device="cpu")
    assert trained.trained_base
    live = {name.replace(".base_layer.", "."): tensor for name, tensor in trained.model.named_parameters()}
    rounded = 0
    for name, tensor in trained.trained_base.items():
        assert torch.equal(live[name], tensor), name
        rounded += not torch.equal(tensor.bfloat16().float(), tensor)
    assert rounded, "nothing trained that bf16 could not hold"
    assert main([*tinyrun.arguments(tmp_path, **{**changes, "training__max_train_steps": 4}), "--resume"]) == 0


def test_a_run_goes_on_with_weights_stored_the_other_way(tmp_path: Path) -> None:
    """They have the same numbers, so it is no change of the run."""
    prepared(tmp_path)
    changes = {**CHANGES, "training__scheduler": "constant", "training__save_steps": 3}
    assert main(tinyrun.arguments(tmp_path, **changes, **AUTO)) == 0
    longer = {**changes, "training__max_train_steps": 5}
    assert main([*tinyrun.arguments(tmp_path, **longer, model__load_precision__mode="fp32"), "--resume"]) == 0


def test_a_merge_rounds_nothing(tmp_path: Path) -> None:
    prepared(tmp_path)
    assert main(tinyrun.arguments(tmp_path, **CHANGES, **AUTO)) == 0
    trained = open_run(tmp_path / "run", registry=REGISTRY, device="cpu")
    ids = torch.randint(5, 100, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        live = trained.model.eval()(input_ids=ids, use_cache=False).logits
        merge_in_place(trained.model, linear_ops_from(REGISTRY))
        merged = trained.model(input_ids=ids, use_cache=False).logits
    assert (merged - live).abs().max() < 1e-5
    assert main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_a_new_token_is_multiplied_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the product of the widened weight, with bias, odd shapes and an adapter; a row of a loss is not."""
    from eulerforge.lora.linear import LoRALinear

    monkeypatch.setattr(stored_weights, "PART", 100)
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 37, dtype=torch.bfloat16).requires_grad_(False)
    layer.__class__ = StoredLinear
    layer.bias.data = layer.bias.data.float()
    parts: list[torch.Size] = []
    in_parts = StoredLinear._in_parts
    monkeypatch.setattr(StoredLinear, "_in_parts", lambda own, x: parts.append(x.shape) or in_parts(own, x))
    x = torch.randn(3, 1, 24)
    expected = torch.nn.functional.linear(x, layer.weight.float(), layer.bias)
    adapted = LoRALinear(layer, r=2, alpha=4).eval()
    torch.nn.init.normal_(adapted.lora_B)
    path = x @ adapted.lora_A.T @ adapted.lora_B.T * 2
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(adapted(x), expected + path, rtol=0, atol=1e-5)
        assert parts == [x.shape] * 2
        assert torch.equal(layer(x.view(1, 3, 24)), expected.view(1, 3, 37))
    assert torch.equal(layer(x.requires_grad_()), expected)
    assert len(parts) == 2


def test_a_strategy_that_may_read_weights_gets_fp32_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A third party's that says nothing of stored weights works as it does on any processor."""
    silent = {"stored_weights": False}
    monkeypatch.setattr(plugin, "StrategySpec", lambda **facts: StrategySpec(**{**facts, **silent}))
    prepared(tmp_path)
    assert main(tinyrun.arguments(tmp_path, **CHANGES, **AUTO)) == 0
    assert "weights: 0 linear layers stay bf16" in (said := capsys.readouterr().err)
    assert "; 21 are fp32, because the strategy may read them itself" in said
    trained = open_run(tmp_path / "run", registry=load_registry(), device="cpu")
    assert not stored(trained.model)


def test_a_model_whose_code_reads_weights_gets_fp32_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As code that comes with a model may: it was a mismatch of precisions in the midst of its forward pass."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward = LlamaAttention.forward

    def reading(own: Any, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        projection = getattr(own.o_proj, "base_layer", own.o_proj)
        hidden_states = hidden_states + 0 * torch.nn.functional.linear(hidden_states, projection.weight)
        return forward(own, hidden_states, *arguments, **keywords)

    monkeypatch.setattr(LlamaAttention, "forward", reading)
    monkeypatch.setattr(stored_weights, "CALL_THEIR_LAYERS", set())
    prepared(tmp_path)
    assert main(tinyrun.arguments(tmp_path, **CHANGES, **AUTO)) == 0
    assert "its code reads weights of linear layers itself, so they are fp32" in capsys.readouterr().err
    assert read_receipt(tmp_path / "run")["stored"] is None


def test_a_weight_that_overflows_as_it_is_rounded_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gemma 3 is loaded in fp32 for its own numbers' sake, and rounded to fp16 after the first look at its weights."""
    prepared(tmp_path, "gemma3", torch.float32)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    next(tensor for name, tensor in tensors.items() if name.endswith("up_proj.weight"))[0, 0] = 1e5
    save_file(tensors, path, {"format": "pt"})
    assert main(tinyrun.arguments(tmp_path, **CHANGES, model__load_precision__mode="fp16")) == 2
    assert "hold NaN or infinity" in capsys.readouterr().err


def test_a_router_trains_where_the_products_are_fp32(tmp_path: Path) -> None:
    prepared(tmp_path, "mixtral")
    phases = [{"step": 0, "trainable": ["lora", "attn_lora", "router"]}]
    changes = {**CHANGES, "model__load_precision__mode": "bf16", "training__phases": phases}
    assert main(tinyrun.arguments(tmp_path, **changes)) == 0


def test_a_damaged_index_is_named_before_anything_is_estimated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = prepared(tmp_path) / "base"
    (base / "model.safetensors").rename(base / "one.safetensors")
    (base / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}', encoding="utf-8")
    assert main([*tinyrun.arguments(tmp_path, **CHANGES, **AUTO), "--preflight"]) == 2
    assert "has no weight_map of tensor names to files" in capsys.readouterr().err


def test_every_hint_about_precision_leads_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a preset whose products are bf16 to base weights that train."""
    tinyrun.prepare(tmp_path)
    phases = [{"step": 0, "trainable": ["lora", "attn_lora", "base_ffn"]}]
    changes = {**CHANGES, "training__phases": phases, "model__load_precision__compute_dtype": "bf16"}
    assert main(tinyrun.arguments(tmp_path, **changes, **AUTO)) == 2
    hint = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("hint: "))
    words = hint.removeprefix("hint: ").partition(", or")[0].split()
    assert main([*tinyrun.arguments(tmp_path, **changes, **AUTO), *words, "--overwrite"]) == 0


def test_states_that_the_model_casts_to_the_stored_precision_are_refused() -> None:
    from eulerforge.errors import ModelError

    layer = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    layer.__class__ = StoredLinear
    with pytest.raises(ModelError, match="got bfloat16 states"):
        layer(torch.ones(1, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize(("mode", "compute"), [("fp32", "bf16"), ("bf16", "fp16"), ("fp16", "bf16")])
def test_a_precision_that_would_say_nothing_is_refused(
    mode: str, compute: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"model__load_precision__mode": mode, "model__load_precision__compute_dtype": compute}
    assert main(tinyrun.arguments(tinyrun.prepare(tmp_path), **asked)) == 2
    said = capsys.readouterr().err
    assert "compute_dtype" in said
    assert f"--set model.load_precision.compute_dtype=auto, or mode={compute}" in said


def test_what_is_forecast_is_what_is_kept(tmp_path: Path) -> None:
    """The estimate's weights, made from config and headers alone, and those of the loaded model: the file's own pages,
    which loading has looked at, and what is fp32 beside them."""
    prepared(tmp_path)
    run = tinyrun.assembled(tmp_path, estimates=True, **CHANGES, **AUTO)
    file = sum(tensor.nbytes for tensor in load_file(tmp_path / "base" / "model.safetensors").values())
    kept = {f"{path}.weight" for path in stored(run.model)}
    wide = {name: p for name, p in run.model.named_parameters() if name not in kept and "lora_" not in name}
    rest = sum(parameter.nbytes for parameter in wide.values())
    assert run.estimated.found.weights == file + rest


def test_an_fp32_file_is_not_counted_where_its_numbers_are_rounded(tmp_path: Path) -> None:
    tinyrun.prepare(tmp_path)
    run = tinyrun.assembled(tmp_path, estimates=True, **CHANGES, model__load_precision__mode="bf16")
    base = {name: parameter for name, parameter in run.model.named_parameters() if "lora_" not in name}
    assert run.estimated.found.weights == sum(parameter.nbytes for parameter in base.values())


def test_a_strategy_that_may_read_experts_is_refused_a_base_that_quantizes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An int8 expert read as numbers lacks its scale: the run would go on, and be wrong."""
    monkeypatch.setattr(plugin, "StrategySpec", lambda **facts: StrategySpec(**{**facts, "stored_weights": False}))
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    prepared(tmp_path, "mixtral", **sizes)
    changes = {**CHANGES, "model__load_precision__mode": "int8"}
    assert main(tinyrun.arguments(tmp_path, **changes)) == 0  # the wrapper is ours, which can do with them
    monkeypatch.setattr("eulerforge.lora.apply.LoRAExperts", ())  # as if it were its own
    capsys.readouterr()
    assert main([*tinyrun.arguments(tmp_path, **changes), "--overwrite"]) == 2
    said = capsys.readouterr().err
    assert "error: model.load_precision.mode: int8 stores the experts at model.layers.0.mlp.experts in" in said
    assert "which the strategy dense_lora may read itself" in said
    assert "linear layers" not in said  # known before anything of the weights is read


@pytest.mark.parametrize("mode", ["auto", "int8"])
def test_the_lines_of_a_mixture_say_what_is(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Convolutions of linear attention and quantized experts are no experts in fp32."""
    sizes = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 24}
    prepared(tmp_path, "qwen3_5_moe", **sizes)
    assert main(tinyrun.arguments(tmp_path, **{**CHANGES, "model__load_precision__mode": mode})) == 0
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("weights:")]
    assert "fused experts are fp32" not in line
    assert ("8 fused expert tensors stay bf16" in line) == (mode == "auto")
    assert ("and 8 fused expert tensors," in said) == (mode == "int8")


def test_an_expert_tensor_that_does_not_fit_is_said_to_stay_in_the_files_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(tmp_path, "mixtral", hidden_size=64, head_dim=16, intermediate_size=96)
    precision = {"model__load_precision__mode": "int4", "model__load_precision__allow_unquantized_experts": True}
    assert main(tinyrun.arguments(tmp_path, **CHANGES, **precision)) == 0
    said = capsys.readouterr().err
    assert (
        "not quantized: 3 fused expert tensors, model.layers.0.mlp.experts.down_proj first, stay bf16 and take" in said
    )
    assert "weights: 3 fused expert tensors stay bf16" in said


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
@pytest.mark.parametrize("mode", ["auto", "int4"])
def test_experts_that_were_made_anew_leave_no_file_in_memory(mode: str, tmp_path: Path) -> None:
    """One view of the file would keep all of its pages there, beside the experts that were stacked from them."""
    prepared(tmp_path, "mixtral", hidden_size=64, head_dim=16, intermediate_size=128)
    run = tinyrun.assembled(tmp_path, **CHANGES, model__load_precision__mode=mode)
    assert any(isinstance(module, StoredExperts) for module in run.model.modules())
    assert str(tmp_path / "base") not in Path("/proc/self/maps").read_text(encoding="utf-8")
