"""int4 and int8 bases through the real commands: train, stop, resume, reopen, bench, merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tinyrun
import torch
from safetensors.torch import load_file

from eulerforge.cli.main import main

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
RUNS = {
    "llama-int4": ("llama", {"model__load_precision__mode": "int4"}),
    "qwen3-int8": ("qwen3", {"model__load_precision__mode": "int8"}),
    "qwen3-fp4": (
        "qwen3",
        {
            "model__load_precision__mode": "int4",
            "model__load_precision__quant_type": "fp4",
            "model__load_precision__double_quant": False,
        },
    ),
    "llama-int8": ("llama", {"model__load_precision__mode": "int8"}),
    "mixtral-int4": ("mixtral", {"model__load_precision__mode": "int4"}),
    "qwen3_moe-int8": ("qwen3_moe", {"model__load_precision__mode": "int8"}),
}
STEPS: dict[str, Any] = {
    "model__load_precision__compute_dtype": "fp32",
    "data__validation__size": 5,
    "injection__lora_dropout": 0.1,
    "training__max_train_steps": 8,
    "training__save_steps": 4,
    "training__val_steps": 4,
    "evaluation__samples": 1,
    "evaluation__max_new_tokens": 4,
}


@pytest.fixture(scope="module", params=RUNS.values(), ids=RUNS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict]:
    """The prepared folder of a finished run, its family and its settings; tests only read it."""
    family, changes = request.param
    sizes = {**SIZES, "moe_intermediate_size": 64} if family == "qwen3_moe" else SIZES
    folder = tinyrun.prepare(tmp_path_factory.mktemp("quantized"), family, **sizes)
    settings = {**STEPS, **changes}
    assert main(tinyrun.arguments(folder, family, **settings)) == 0
    return folder, family, settings


def test_the_loss_falls(trained: tuple[Path, str, dict]) -> None:
    folder, _, _ = trained
    rows = tinyrun.metrics(folder / "run")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) >= 8
    assert losses[-1] < 0.95 * losses[0]


def test_resume_is_exact_to_the_bit(trained: tuple[Path, str, dict], tmp_path: Path) -> None:
    """The first part evaluated (an eval forward) before it was cut, as every run does."""
    folder, family, settings = trained
    out = tmp_path / "run"
    shutil.copytree(folder / "run", out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoint-8")
    (out / "summary.json").unlink()
    assert main([*tinyrun.arguments(folder, family, **{**settings, "output_dir": str(out)}), "--resume"]) == 0
    for file in tinyrun.FILES:
        ours, theirs = (load_file(path / "checkpoint-8" / file) for path in (out, folder / "run"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file
    assert tinyrun.metrics(out) == tinyrun.metrics(folder / "run")


def test_bench_reopens_final_and_says_which_base_it_merged_into(
    trained: tuple[Path, str, dict], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, settings = trained
    scores = {}
    for words in ((), ("--live",)):
        capsys.readouterr()
        assert main(["bench", str(folder / "run"), *words, "--json"]) == 0
        scores[words] = json.loads(capsys.readouterr().out)["data"]
    merged, live = scores[()], scores[("--live",)]
    assert merged["tuned"]["loss"] < merged["base"]["loss"]
    assert merged["tuned"]["loss"] == pytest.approx(live["tuned"]["loss"], rel=1e-5)
    mode = settings["model__load_precision__mode"]
    assert any(note.startswith(f"the adapters are merged into the dequantized {mode}") for note in merged["notes"])
    found = [row["held_out_loss"] for row in tinyrun.metrics(folder / "run") if "held_out_loss" in row][-1]
    assert live["tuned"]["loss"] == pytest.approx(found, rel=1e-5)


def delta_of(name: str, adapter: dict[str, torch.Tensor]) -> torch.Tensor:
    """What an adapter adds to a tensor of the base's files, which hold every expert by itself; alpha 8, r 4."""
    path = name.removesuffix(".weight").replace("block_sparse_moe", "mlp")
    if f"{path}.lora_A" in adapter:
        return adapter[f"{path}.lora_B"] @ adapter[f"{path}.lora_A"] * 2
    experts, expert, part = path.rsplit(".", 2)
    fused = f"{experts}.{'down_proj' if part in ('w2', 'down_proj') else 'gate_up_proj'}"
    delta = adapter[f"{fused}.lora_B"][int(expert)] @ adapter[f"{fused}.lora_A"][int(expert)] * 2
    gate, up = delta.chunk(2)
    return {"w1": gate, "gate_proj": gate, "w3": up, "up_proj": up}.get(part, delta)


REPLACED = {"mixtral": 3 * (2 + 4 * 3), "qwen3_moe": 5 + 2 * (2 + 4 * 3)}
"""Tensors of the files that a run changes: of 3 layers with 4 experts; the first of Qwen3's is dense."""


def test_an_export_adds_the_delta_to_the_original_base(trained: tuple[Path, str, dict], tmp_path: Path) -> None:
    folder, family, settings = trained
    assert main(["merge", str(folder / "run"), "--output", str(tmp_path / "merged")]) == 0
    receipt = json.loads((tmp_path / "merged" / "eulerforge_export.json").read_text())
    assert receipt["merged_into"] == "original base files"
    assert receipt["base"]["trained_as"] == settings["model__load_precision__mode"]
    base = load_file(folder / "base" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_file(folder / "run" / "final" / "adapter.safetensors")
    assert len(receipt["tensors_replaced"]) == REPLACED.get(family, 3 * 5)
    for name in receipt["tensors_replaced"]:
        delta = delta_of(name, adapter)
        assert (merged[name] - base[name] - delta).norm() < 1e-3 * delta.norm(), name
    assert all(torch.equal(base[name], merged[name]) for name in base.keys() - set(receipt["tensors_replaced"]))


def test_final_holds_the_quantized_base_and_it_reopens(trained: tuple[Path, str, dict]) -> None:
    """Every quantized layer comes back from the file, to the bit, through bitsandbytes' own reader."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    from eulerforge.export.rundir import open_run
    from eulerforge.models.experts import StoredExperts
    from eulerforge.models.quantized import quantized_ops
    from eulerforge.plugins import load_registry

    folder, family, settings = trained
    state: dict[str, torch.Tensor] = {}
    for file in (folder / "run" / "final").glob("model_with_adapters*.safetensors"):
        state |= load_file(file)
    model = open_run(folder / "run", registry=load_registry()).model
    layers = {path: m for path, m in model.named_modules() if quantized_ops(m) is not None}
    wanted = {f"{path}.weight": (f"{path}.SCB", quantized_ops(m).dequantize(m)) for path, m in layers.items()}
    for path, experts in model.named_modules():
        if isinstance(experts, StoredExperts):
            for name in ("gate_up_proj", "down_proj"):
                wanted[f"{path}.{name}"] = f"{path}.{name}_SCB", experts.whole(name, torch.float32)
    linear, fused = {"mixtral": (3 * 4, 3 * 2), "qwen3_moe": (3 * 4 + 3, 2 * 2)}.get(family, (3 * 7, 0))
    assert (len(layers), len(wanted) - len(layers)) == (linear, fused)
    for name, (scales, weight) in wanted.items():
        if settings["model__load_precision__mode"] == "int4":
            parts = {k: v for k, v in state.items() if k.startswith(f"{name}.")}
            read = Params4bit.from_prequantized(state[name], parts, device="cpu")
            found = dequantize_4bit(read.data, read.quant_state)
        else:
            found = state[name].float() * (state[scales][..., None] / 127)
        assert torch.equal(found.float(), weight), name


def test_base_weights_cannot_train_in_a_quantized_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tinyrun.prepare(tmp_path, **SIZES)
    settings = {
        "model__load_precision__mode": "int4",
        "training__phases": [{"step": 0, "trainable": ["lora", "attn_lora", "base_ffn"]}],
    }
    assert main(tinyrun.arguments(folder, **settings)) == 2
    assert "base weights train in fp32 only" in capsys.readouterr().err


def test_preflight_refuses_experts_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tinyrun.prepare(tmp_path, "mixtral", hidden_size=64, head_dim=16)
    words = tinyrun.arguments(folder, "llama", model__load_precision__mode="int4", backbone="auto")
    assert main([*words, "--preflight"]) == 2
    text = capsys.readouterr().err
    assert "error: model.load_precision.mode: int4 does not reach the experts" in text
    assert "Traceback" not in text


def test_preflight_of_a_quantized_base_counts_its_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tinyrun.prepare(tmp_path, **SIZES)
    counts = {}
    for mode in ("fp32", "int4", "int8"):
        capsys.readouterr()
        assert main([*tinyrun.arguments(folder, model__load_precision__mode=mode), "--preflight", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)["data"]
        counts[mode] = shown["parameters"]
    assert len(set(counts.values())) == 1
