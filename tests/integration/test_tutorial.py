"""The tutorial's commands run as it writes them, and each of its promises holds; the models are tiny and local.

What a command needs on top (the tiny model, the CPU, a few steps) is appended; its own words are not touched.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tinyrun
import torch
from safetensors.torch import load_file

from eulerforge.cli.main import main

BASIC = r"""
eulerforge train --preset configs/presets/qwen3.5_0.8b_dense_lora_sft.yml \
    --set data.format=raw \
    --set data.task=sft \
    --set data.path=data/sft_10k_raw.jsonl \
    --set data.max_length=512
"""
OVERRIDES = r"""
eulerforge train --preset configs/presets/qwen3.5_0.8b_dense_lora_sft.yml \
    --set data.format=raw \
    --set data.task=sft \
    --set data.path=data/sft_10k_raw.jsonl \
    --set data.max_length=512 \
    --set training.lr=2e-5 \
    --set injection.lora_r=32 \
    --set training.max_train_steps=10000
"""
VALIDATE = r"""
eulerforge train --preset configs/presets/qwen3.5_0.8b_dense_lora_sft.yml \
    --validate-only
"""
PREFLIGHT = r"""
eulerforge train --preset configs/presets/qwen3.5_0.8b_dense_lora_sft.yml \
    --preflight
"""
DEBUG = r"""
eulerforge train --preset configs/presets/qwen3.5_0.8b_dense_lora_sft.yml \
    --debug \
    --debug-trainable-names \
    --debug-every 10 \
    --set data.format=raw \
    --set data.task=sft \
    --set data.path=data/sft_10k_raw.jsonl \
    --set data.max_length=512
"""
RUN = Path("runs/qwen3.5_0.8b_dense_lora_sft")
Command = Callable[..., int]


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def base(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("base"), family)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the tutorial's data file and no preset."""
    tiny.write_rows(tmp_path / "data" / "sft_10k_raw.jsonl", 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tutorial(here: Path, base: Path, family: str) -> Command:
    """Runs a command of the tutorial with the tiny model put in; gives back its exit code."""

    def run(command: str, *more: str, steps: int = 3) -> int:
        words = as_the_shell_splits(command)
        extra = [f"model_name={base}", "device=cpu", f"training.max_train_steps={steps}"]
        if family == "llama":
            extra.append("backbone=llama3")
        for setting in extra:
            words += ["--set", setting]
        return main([*words, *more])

    return run


def as_the_shell_splits(command: str) -> list[str]:
    """The words after ``eulerforge``; a backslash at the end of a line joins it to the next."""
    program, *words = shlex.split(command.replace("\\\n", " "))
    assert program == "eulerforge"
    return words


def rewritten(run: Path = RUN) -> dict[str, Any]:
    import tomli

    config: dict[str, Any] = tomli.loads((run / "resolved_config.toml").read_text())
    return config


def test_1_basic_execution(tutorial: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert tutorial(BASIC) == 0
    captured = capsys.readouterr()
    assert "note: " in captured.err
    assert "qwen3.5_0.8b_dense_lora_sft" in captured.err.partition("note: ")[2].splitlines()[0]
    assert f"written to {RUN / 'final'}" in captured.out
    config = rewritten()
    assert config["injection"]["lora_r"] == 48
    assert config["training"]["grad_accum_steps"] == 4
    rows = tinyrun.metrics(RUN)
    # steps are optimizer steps: 4 x 4 rows each, and the preset's warm-up of 200 steps has only begun
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["lr"] for row in rows] == pytest.approx([1e-5 * step / 200 for step in (1, 2, 3)])
    assert rows[0]["epoch"] == pytest.approx(16 / 40)
    assert rows[0]["phase"] == ["lora", "attn_lora"]


def test_2_configuration_overrides(tutorial: Command) -> None:
    assert tutorial(OVERRIDES) == 0
    config = rewritten()
    assert config["training"]["lr"] == 2e-5
    assert config["injection"]["lora_r"] == 32
    adapters = load_file(RUN / "final" / "adapter.safetensors")
    assert adapters["model.layers.0.mlp.gate_proj.lora_A"].shape[0] == 32
    assert tinyrun.metrics(RUN)[0]["lr"] == pytest.approx(2e-5 / 200)


def test_3_validate_only(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As written to the last word: no model is needed."""
    assert main(as_the_shell_splits(VALIDATE)) == 0
    assert "the configuration is valid" in capsys.readouterr().out
    assert sorted(path.name for path in here.iterdir()) == ["data"]


def test_4_preflight(tutorial: Command, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tutorial(PREFLIGHT) == 0
    captured = capsys.readouterr()
    # three layers of width 32 and 48; k and v have half the heads
    lora, attention = 3 * 48 * 3 * (32 + 48), 3 * 48 * ((32 + 32) + (32 + 16))
    assert f"lora                    18 tensors  {lora:>14,} parameters" in captured.out
    assert f"attn_lora               12 tensors  {attention:>14,} parameters" in captured.out
    assert sorted(path.name for path in here.iterdir()) == ["data"], "preflight writes nothing"
    assert tutorial(PREFLIGHT, "--json") == 0
    groups = json.loads(capsys.readouterr().out)["data"]["groups"]
    assert groups["lora"] == {"tensors": 18, "parameters": lora}


def test_5_debug_mode(tutorial: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert tutorial(DEBUG, steps=20) == 0
    shown = capsys.readouterr().err
    assert "  model.layers.0.mlp.gate_proj.lora_A  (48, 32)  float32" in shown
    assert [line for line in shown.splitlines() if line.endswith(" norms")] == ["step 10 norms", "step 20 norms"]
    for group in ("lora", "attn_lora"):
        assert f"  {group}: gradient norm " in shown


def test_checkpoint_structure_and_bench(
    tutorial: Command, base: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tutorial(BASIC, "--set", "training.lr=0.01", "--set", "training.warmup_steps=0") == 0
    found = load_file(RUN / "final" / "model_with_adapters.safetensors")
    weights = load_file(base / "model.safetensors")
    for layer in range(3):
        for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"):
            path = f"model.layers.{layer}.{name}"
            weight = weights[f"{path}.weight"]
            assert found[f"{path}.base_layer.weight"].shape == weight.shape
            torch.testing.assert_close(found[f"{path}.base_layer.weight"].float(), weight, rtol=1e-2, atol=1e-2)
            assert found[f"{path}.lora_A"].shape == (48, weight.shape[1])
            assert found[f"{path}.lora_B"].shape == (weight.shape[0], 48)
            assert found[f"{path}.lora_B"].abs().max() > 0
    assert f"{path.replace('v_proj', 'k_proj')}.weight" in found, "what is not adapted keeps its name"
    capsys.readouterr()
    assert main(["bench", str(RUN), "--data", "data/sft_10k_raw.jsonl", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["data"]
    assert result["mode"] == "merged"
    assert result["tuned"]["loss"] < result["base"]["loss"]


def test_the_base_never_trains_unless_a_phase_names_it(tutorial: Command, base: Path) -> None:
    fp32 = ("--set", "model.load_precision.mode=fp32")
    assert tutorial(BASIC, *fp32, "--set", "training.lr=0.01", "--set", "training.warmup_steps=0") == 0
    found = load_file(RUN / "final" / "model_with_adapters.safetensors")
    for name, weight in load_file(base / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        assert torch.equal(found.get(name, found.get(f"{stem}.base_layer.weight")), weight)


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown


def test_no_trainable_parameters(tutorial: Command, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ("--set", "injection.target_keywords=[gate_prj]", "--set", "injection.attn_lora.enabled=false")
    shown = refused(capsys, tutorial(PREFLIGHT, *wrong))
    assert "No trainable parameters" in shown
    assert "gate_proj" in shown, "the nearest layer names"
    shown = refused(capsys, tutorial(BASIC, "--set", "injection.target_keywords=[gate_prj, up_proj]"))
    assert "'gate_prj' matches nothing" in shown


def test_rank_0_would_be_identity(tutorial: Command, capsys: pytest.CaptureFixture[str]) -> None:
    shown = refused(capsys, tutorial(VALIDATE, "--set", "injection.lora_r=0"))
    assert "LoRA layers will act as Identity" in shown
    assert "hint: lora_r must be 1 or higher" in shown


def test_router_in_trainable_is_a_warning(tutorial: Command, capsys: pytest.CaptureFixture[str]) -> None:
    phases = '--set=training.phases=[{step = 0, trainable = ["lora", "attn_lora", "router"]}]'
    assert tutorial(VALIDATE, phases) == 0
    shown = capsys.readouterr().err
    assert "warning: " in shown
    assert "dense_lora typically has no router params" in shown
    assert tutorial(BASIC, phases, steps=1) == 0
    assert set(tinyrun.metrics(RUN)[0]["phase"]) == {"lora", "attn_lora", "router"}


def test_an_injection_scope_beyond_the_depth_names_the_depth(
    tutorial: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    scope = ("--set", "injection.start_layer=2", "--set", "injection.num_layers=2")
    shown = refused(capsys, tutorial(PREFLIGHT, *scope))
    assert "the model has 3 layers (0 to 2)" in shown


def test_an_injection_scope_adapts_these_layers_alone(tutorial: Command) -> None:
    assert tutorial(BASIC, "--set", "injection.start_layer=1", "--set", "injection.num_layers=1", steps=1) == 0
    adapters = load_file(RUN / "final" / "adapter.safetensors")
    assert {name.split(".")[2] for name in adapters} == {"1"}


def test_attn_lora_off_and_its_own_rank(tutorial: Command) -> None:
    assert tutorial(BASIC, "--set", "injection.attn_lora.lora_r=2", "--set", "injection.attn_lora.lora_alpha=4") == 0
    adapters = load_file(RUN / "final" / "adapter.safetensors")
    assert adapters["model.layers.0.self_attn.q_proj.lora_A"].shape[0] == 2
    assert adapters["model.layers.0.mlp.up_proj.lora_A"].shape[0] == 48
    off = ("--set", "injection.attn_lora.enabled=false", "--set", 'training.phases=[{step = 0, trainable = ["lora"]}]')
    assert tutorial(BASIC, "--overwrite", *off) == 0
    assert not [name for name in load_file(RUN / "final" / "adapter.safetensors") if "self_attn" in name]


def test_a_phase_that_names_a_group_without_parameters_is_refused(
    tutorial: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """attn_lora is off, and the preset's phase still names it."""
    shown = refused(capsys, tutorial(BASIC, "--set", "injection.attn_lora.enabled=false"))
    assert "No trainable parameters in group attn_lora" in shown


def test_backbone_auto_and_a_backbone_that_does_not_fit(
    tutorial: Command, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tutorial(PREFLIGHT, "--set", "backbone=auto", "--json") == 0
    fitting = tinyrun.BACKBONES[family]
    assert json.loads(capsys.readouterr().out)["data"]["backbone"] == fitting
    other = "qwen3" if family == "llama" else "llama3"
    shown = refused(capsys, tutorial(PREFLIGHT, "--set", f"backbone={other}"))
    assert f"backbone {other} does not fit" in shown
    assert f"--set backbone={fitting}" in shown


def test_rows_of_every_raw_kind_train_together(
    tutorial: Command, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Who builds?", "response": "The builder."},
        {"text": "A beam carries load."},
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Law."}]},
        {"instruction": "Translate", "input": "hus", "output": "house"},
    ]
    (here / "data" / "sft_10k_raw.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert tutorial(BASIC, steps=1) == 0
    shown = capsys.readouterr().err
    for kind in ("1 prompt/response", "1 text", "1 messages", "1 instruction/output"):
        assert kind in shown


def test_processed_rows_and_columns_of_other_names(tutorial: Command, here: Path) -> None:
    path = here / "data" / "ids.jsonl"
    path.write_text('{"input_ids": [1, 40, 41, 42], "labels": [-100, -100, 41, 42]}\n')
    more = ("--set", "data.format=processed", "--set", "data.path=data/ids.jsonl")
    assert tutorial(BASIC, *more, steps=1) == 0
    assert tinyrun.metrics(RUN)[0]["label_tokens"] == 16 * 2  # the one row, 16 times a step
    (here / "data" / "named.jsonl").write_text('{"q": "Why?", "a": "Law."}\n')
    more = ("--set", "data.path=data/named.jsonl", "--set", "data.schema.prompt=q", "--set", "data.schema.response=a")
    assert tutorial(BASIC, "--overwrite", *more, steps=1) == 0


def test_the_tutorial_s_own_pair_runs_and_says_what_it_covers(
    here: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """``backbone: qwen3`` with a Qwen3.5 checkpoint, whose linear-attention layers have no q_proj and v_proj."""
    base = tiny.save_tiny(tmp_path_factory.mktemp("qwen3.5"), "qwen3_5")
    config = json.loads((base / "config.json").read_text())
    linear = [index for index, kind in enumerate(config["layer_types"]) if kind == "linear_attention"]
    assert 0 < len(linear) < config["num_hidden_layers"] == 4
    tiny_model = ["--set", f"model_name={base}", "--set", "device=cpu"]
    assert main([*as_the_shell_splits(PREFLIGHT), *tiny_model]) == 0
    shown = capsys.readouterr().out
    gap = f"reaches {4 - len(linear)} of 4 layers; not reached: {', '.join(map(str, linear))}"
    for keyword in ("q_proj", "v_proj"):
        assert f"warning: {keyword} {gap}" in shown
    assert "gate_proj reaches" not in shown
    assert main([*as_the_shell_splits(BASIC), *tiny_model, "--set", "training.max_train_steps=1"]) == 0
    assert f"warning: q_proj {gap}" in capsys.readouterr().err
