"""Every family's merged folder: its own format, everything else untouched, reopened by plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file

from eulerforge.errors import ModelError
from eulerforge.export.merged import write_merged
from eulerforge.export.rundir import TrainedRun
from eulerforge.testing.tiny_models import FAMILIES

MakeRun = Callable[..., TrainedRun]
IDS = torch.tensor([[5, 9, 33, 70, 12, 101, 4, 8, 61, 30, 22, 90]])
LAYOUTS = {
    "qwen3_moe": "model.layers.1.mlp.experts.3.{}.weight",
    "qwen3_5_moe": "model.layers.1.mlp.experts.3.{}.weight",
    "qwen3_5_moe_multimodal": "model.language_model.layers.1.mlp.experts.3.{}.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.{}.weight",
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_reopens_in_plain_transformers_with_the_live_logits(
    make_family_run: MakeRun, tmp_path: Path, family: str, sharded: bool
) -> None:
    from transformers import AutoModelForCausalLM

    run = make_family_run(family, shard_size="40KB" if sharded else None)
    written = write_merged(run, tmp_path / "out", verify=False)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(run.source.folder).eval()(IDS).logits
        live, reopened = run.model(IDS).logits, model.eval()(IDS).logits
    torch.testing.assert_close(reopened, live, rtol=1e-5, atol=1e-5)
    assert (live - plain).abs().max() > 1e-3
    before, after = tensors(run.source.folder), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(written.tensors)
    assert not any("vis" in name for name in written.tensors)
    assert {path.name for path in run.source.folder.glob("*.safetensors*")} == {
        path.name for path in (tmp_path / "out").glob("*.safetensors*")
    }
    config = (run.source.folder / "config.json").read_bytes()
    assert (tmp_path / "out" / "config.json").read_bytes() == config
    if sharded:
        assert len({path.name for path in (tmp_path / "out").glob("*.safetensors")}) > 2


@pytest.mark.parametrize(("family", "layout"), LAYOUTS.items())
def test_a_fused_parameter_goes_back_into_the_experts_of_the_files(
    make_family_run: MakeRun, tmp_path: Path, family: str, layout: str
) -> None:
    run = make_family_run(family)
    write_merged(run, tmp_path / "out", verify=False)
    experts = next(m for p, m in run.model.named_modules() if p.endswith("layers.1.mlp.experts"))
    full = {
        name: experts.base_layer.get_parameter(name)[3].double()
        + path.lora_B[3].double() @ path.lora_A[3].double() * 4.0
        for name, path in experts.paths.items()
    }
    gate, up = full["gate_up_proj"].chunk(2)
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    after = tensors(tmp_path / "out")
    for name, wanted in zip(names, (gate, up, full["down_proj"]), strict=True):
        torch.testing.assert_close(after[layout.format(name)].double(), wanted.detach(), rtol=1e-6, atol=1e-6)


def test_a_folder_whose_experts_are_fused_stays_so(make_family_run: MakeRun, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = make_family_run("qwen3_5_moe_multimodal")
    # as the published checkpoints of this family have it
    path = run.source.folder / "model.safetensors"
    fused = {name: tensor for name, tensor in load_file(path).items() if ".mlp.experts." not in name}
    for name, parameter in run.model.named_parameters():
        if ".mlp.experts.base_layer." in name:
            key = name.replace("model.layers", "model.language_model.layers").replace(".base_layer.", ".")
            fused[key] = parameter.detach().clone()
    save_file(fused, path, metadata={"format": "pt"})
    written = write_merged(run, tmp_path / "out", verify=False)
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in written.tensors
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, run.model(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_5_multimodal", "gemma3_multimodal"])
def test_tensors_that_the_text_model_does_not_use_and_their_dtype_stay(
    make_family_run: MakeRun, tmp_path: Path, family: str
) -> None:
    head = {"mtp.layers.0.mlp.gate_proj.weight": torch.randn(4, 4, dtype=torch.float16), "mtp.count": torch.tensor(3)}
    run = make_family_run(family, dtype=torch.bfloat16, tensors=head)
    write_merged(run, tmp_path / "out", verify=False)
    before, after = tensors(run.source.folder), tensors(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: tensor.dtype for n, tensor in before.items()}
    assert torch.equal(after["mtp.layers.0.mlp.gate_proj.weight"], head["mtp.layers.0.mlp.gate_proj.weight"])
    assert after["mtp.count"] == 3
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if "vision" in name or "vis" in name)


def test_a_router_and_fused_experts_that_were_trained_themselves(make_family_run: MakeRun, tmp_path: Path) -> None:
    run = make_family_run("mixtral", keywords=("down_proj",))
    router = torch.randn(4, 32)
    run.model.model.layers[0].mlp.gate.weight.copy_(router)
    fused = torch.randn(4, 96, 32) * 0.1
    run.model.model.layers[1].mlp.experts.base_layer.gate_up_proj.copy_(fused)
    down = torch.randn(4, 32, 48) * 0.1
    run.model.model.layers[1].mlp.experts.base_layer.down_proj.copy_(down)
    values = {
        "model.layers.0.mlp.gate.weight": router,
        "model.layers.1.mlp.experts.gate_up_proj": fused,
        "model.layers.1.mlp.experts.down_proj": down,
    }
    write_merged(attrs.evolve(run, trained_base=values), tmp_path / "out")
    after = tensors(tmp_path / "out")
    assert torch.equal(after["model.layers.0.block_sparse_moe.gate.weight"], router)
    assert torch.equal(after["model.layers.1.block_sparse_moe.experts.2.w3.weight"], fused[2, 48:])
    path = run.model.model.layers[1].mlp.experts.paths["down_proj"]
    wanted = down[2] + path.lora_B[2] @ path.lora_A[2] * 4
    torch.testing.assert_close(after["model.layers.1.block_sparse_moe.experts.2.w2.weight"], wanted)


@pytest.mark.parametrize("fault", ["too few", "too many"])
def test_files_with_another_number_of_experts_are_refused(make_family_run: MakeRun, tmp_path: Path, fault: str) -> None:
    run = make_family_run("mixtral")
    path = run.source.folder / "model.safetensors"
    content = load_file(path)
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    if fault == "too few":
        del content[name.format(3)]
    else:
        content[name.format(4)] = torch.zeros(48, 32)
    save_file(content, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"other experts for .* than the 4 of the model"):
        write_merged(run, tmp_path / "out")


def test_the_index_of_a_sharded_mixture_fits_its_files(make_family_run: MakeRun, tmp_path: Path) -> None:
    run = make_family_run("mixtral", shard_size="40KB")
    written = write_merged(run, tmp_path / "out", dtype="bf16")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    after = tensors(tmp_path / "out")
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == written.size == sum(t.nbytes for t in after.values())
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
