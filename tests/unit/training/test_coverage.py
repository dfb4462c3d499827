"""The rehearsal on the meta device: counts of the real models, planted faults caught before a weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tinyrun
from realconfig import config_folder
from tiny import save_tiny

from eulerforge.api import InjectionReport
from eulerforge.config import load_run_config
from eulerforge.errors import ConfigError, EulerForgeError, PluginError
from eulerforge.plugins import load_registry
from eulerforge.training.assemble import assemble
from eulerforge.training.coverage import rehearse

REGISTRY = load_registry()
TUTORIAL = "qwen3.5_0.8b_dense_lora_sft"


def tutorial(model: Path | str, backbone: str = "auto", *sets: str) -> Any:
    """The tutorial's preset (r = 48, gate, up, down, q, v) with another model."""
    changes = [f"model_name={model}", f"backbone={backbone}", "device=cpu", *sets]
    return load_run_config(TUTORIAL, changes, strategy_configs=REGISTRY.strategy_config).run


@pytest.mark.parametrize(
    ("name", "backbone", "adapters", "millions"),
    [
        # layers x 48 x (3 (hidden + intermediate) + (hidden + q) + (hidden + v))
        ("qwen3-0.6b", "qwen3", 28 * 48 * (3 * (1024 + 3072) + (1024 + 2048) + (1024 + 1024)), "23.40"),
        ("llama3.2-1b", "llama3", 16 * 48 * (3 * (2048 + 8192) + (2048 + 2048) + (2048 + 512)), "28.70"),
        ("gemma3-1b", "gemma3", 26 * 48 * (3 * (1152 + 6912) + (1152 + 1024) + (1152 + 256)), "34.66"),
        # q and v in 6 of 24 layers; q has a query and a gate for each of 8 heads of 256
        ("qwen3.5-0.8b", "qwen3", 48 * (24 * 3 * (1024 + 3584) + 6 * ((1024 + 4096) + (1024 + 512))), "17.84"),
        # and in_proj_qkv in the other 18
        (
            "qwen3.5-0.8b",
            "qwen3.5",
            48 * (24 * 3 * (1024 + 3584) + 6 * ((1024 + 4096) + (1024 + 512)) + 18 * (1024 + 6144)),
            "24.04",
        ),
    ],
)
def test_the_tutorials_targets_on_the_real_sizes(
    name: str, backbone: str, adapters: int, millions: str, tmp_path: Path
) -> None:
    report = rehearse(tutorial(config_folder(tmp_path, name), backbone), REGISTRY)
    assert isinstance(report, InjectionReport)
    assert report.parameter_count == adapters
    assert f"{report.parameter_count / 1e6:.2f}" == millions
    assert report.layers == tuple(range(report.depth))


def test_the_tutorials_pair_says_which_layers_it_covers(tmp_path: Path) -> None:
    report = rehearse(tutorial(config_folder(tmp_path, "qwen3.5-0.8b"), "qwen3"), REGISTRY)
    assert isinstance(report, InjectionReport)
    missed = "0-2, 4-6, 8-10, 12-14, 16-18, 20-22"
    assert report.gaps == tuple(
        f"{word} reaches 6 of 24 layers; not reached: {missed}" for word in ("q_proj", "v_proj")
    )
    full = [layer for layer in range(24) if layer % 4 == 3]
    assert report.coverage()["attn.q"] == {
        "reached": full, "present": full, "layers": 6, "sites": 6, "parameters": 6 * 48 * (1024 + 4096),
    }  # fmt: skip


ONLY_ATTENTION = "training.phases=[{step = 0, trainable = ['attn_lora']}]"
ONLY_FEED_FORWARD = "training.phases=[{step = 0, trainable = ['lora']}]"
PLANTED = {
    "misspelt keyword beside good ones": (
        "qwen3-0.6b",
        "auto",
        ["injection.target_keywords=['gate_proj', 'upp_proj']"],
        "the keyword 'upp_proj' matches nothing in the chosen layers",
    ),
    "q_proj and v_proj only on Qwen3.5": (
        "qwen3.5-0.8b",
        "qwen3.5",
        ["injection.match=exact"],
        "q_proj reaches 6 of 24 layers; not reached: 0-2, 4-6, 8-10, 12-14, 16-18, 20-22; left out: linear_attn.qkv",
    ),
    "a keyword of one kind of layer": (
        "qwen3.5-0.8b",
        "qwen3.5",
        ["injection.target_keywords=['in_proj_z']", "injection.attn_lora.enabled=false", ONLY_ATTENTION],
        "in_proj_z reaches 18 of 24 layers; not reached: 3, 7, 11, 15, 19, 23",
    ),
    "a name of the vision tower": (
        "gemma3-4b",
        "gemma3",
        ["injection.target_keywords=['up_proj', 'fc1']"],
        "model.vision_tower.encoder.layers.0.mlp.fc1 lies outside the decoder layers and is never adapted",
    ),
    "wrong backbone": ("mixtral-8x7b", "qwen3", [], "backbone qwen3 does not fit"),
    "a dense backbone on a mixture": ("qwen3.5-35b-a3b", "llama3", [], "backbone llama3 does not fit"),
    "start_layer beyond the depth": (
        "qwen3-0.6b",
        "auto",
        ["injection.start_layer=28"],
        "layers up to 28 are asked for, but the model has 28 layers",
    ),
    "a window beyond the depth": (
        "llama3.2-1b",
        "auto",
        ["injection.start_layer=10", "injection.num_layers=7"],
        "layers up to 16 are asked for, but the model has 16 layers (0 to 15)",
    ),
    "adapters that no phase trains": (
        "qwen3-0.6b",
        "auto",
        ["injection.target_keywords=['q_proj', 'up_proj']", "injection.attn_lora.enabled=false", ONLY_FEED_FORWARD],
        "no phase trains the group attn_lora: its 28 adapters (q_proj) would stay as they begin",
    ),
    "empty phase group": (
        "qwen3-0.6b",
        "auto",
        [ONLY_ATTENTION, "injection.attn_lora.enabled=false"],
        "No trainable parameters in group attn_lora",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_caught_before_a_weight_is_read(fault: str, tmp_path: Path) -> None:
    name, backbone, sets, message = PLANTED[fault]
    # the folder holds no weights, so an error of the loading would be another one
    config = tutorial(config_folder(tmp_path, name), backbone, *sets)
    with pytest.raises(EulerForgeError) as caught:
        assemble(config, REGISTRY, out=tmp_path / "run", need_data=False)
    assert message in " | ".join(problem.message for problem in caught.value.problems)
    assert caught.value.exit_code == 2
    assert caught.value.problems[0].hint


def test_a_rank_of_zero_is_caught_without_a_model() -> None:
    with pytest.raises(ConfigError, match="LoRA layers will act as Identity"):
        tutorial("m", "auto", "injection.lora_r=0")


def test_what_the_preset_declares_goes_through_and_is_recorded(tmp_path: Path) -> None:
    sets = ("injection.match=exact", "injection.allow_partial=true")
    report = rehearse(tutorial(config_folder(tmp_path, "qwen3.5-0.8b"), "qwen3.5", *sets), REGISTRY)
    assert isinstance(report, InjectionReport)
    stored = report.to_json()
    assert stored["allow_partial"] is True
    assert len(stored["gaps"]) == 2
    assert f"{report.parameter_count / 1e6:.2f}" == "17.84"


def test_the_receipt_and_the_manifest_say_what_was_allowed(tmp_path: Path) -> None:
    from eulerforge.training.receipt import make_receipt

    tinyrun.prepare(tmp_path)
    run = tinyrun.assembled(tmp_path, injection__target_keywords=["up_proj", "nothing"], injection__allow_partial=True)
    receipt = make_receipt(run, REGISTRY, {}, "id")
    gap = "the keyword 'nothing' matches nothing in the chosen layers"
    assert receipt["coverage"] == {"allow_partial": True, "gaps": [gap]}
    assert gap in run.warnings


def test_an_injection_that_needs_values_is_checked_after_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strategy that starts from the weights' values (an SVD, say) has none to look at."""
    from eulerforge_strategy_dense_lora.injection import DenseLoRAInjection

    real = DenseLoRAInjection.inject

    def looks_at_values(self: Any, model: Any, *rest: Any) -> Any:
        float(model.model.norm.weight.sum())
        return real(self, model, *rest)

    monkeypatch.setattr(DenseLoRAInjection, "inject", looks_at_values)
    tinyrun.prepare(tmp_path)
    said: list[str] = []
    config = tinyrun.loaded(tmp_path).run
    run = assemble(config, REGISTRY, out=tmp_path / "run", say=said.append)
    assert "the coverage is checked after loading: strategy dense_lora" in said[0]
    assert run.report.parameter_count > 0


def test_any_other_failure_of_a_strategy_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eulerforge_strategy_dense_lora.injection import DenseLoRAInjection

    def fails(*_: Any) -> Any:
        raise RuntimeError("out of ideas")

    monkeypatch.setattr(DenseLoRAInjection, "inject", fails)
    save_tiny(tmp_path)
    with pytest.raises(PluginError, match="raised RuntimeError: out of ideas"):
        rehearse(tutorial(tmp_path), REGISTRY)


def test_the_rehearsal_and_the_run_report_the_same(tmp_path: Path) -> None:
    for family, backbone in (("qwen3_5", "qwen3.5"), ("gemma3_multimodal", "gemma3"), ("qwen3_5_multimodal", "qwen3")):
        folder = save_tiny(tmp_path / family, family)
        config = tutorial(folder, backbone, "injection.lora_r=2", "model.load_precision.mode=fp32")
        run = assemble(config, REGISTRY, out=tmp_path / "run", need_data=False)
        assert rehearse(config, REGISTRY) == run.report


def test_the_feed_forward_keywords_mean_the_experts_of_a_mixture(tmp_path: Path) -> None:
    report = rehearse(tutorial(config_folder(tmp_path, "mixtral-8x7b")), REGISTRY)
    assert isinstance(report, InjectionReport)
    counts = {role: row["parameters"] for role, row in report.coverage().items() if row["parameters"]}
    layers, experts, r, hidden, intermediate = 32, 8, 48, 4096, 14336
    assert counts == {
        "attn.q": layers * r * (hidden + hidden),
        "attn.v": layers * r * (hidden + 1024),
        "experts.gate_up": layers * experts * r * (hidden + 2 * intermediate),
        "experts.down": layers * experts * r * (intermediate + hidden),
    }
