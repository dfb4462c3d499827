"""Every bundled preset is valid, and on its model's real sizes it reaches what it promises; no weights here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from realconfig import HUB_NAMES, NAMES, config_folder

from eulerforge.api import InjectionReport
from eulerforge.cli.main import main
from eulerforge.config import load_run_config
from eulerforge.config.presets import bundled_folder, list_presets
from eulerforge.models.load import model_types
from eulerforge.models.meta import meta_model
from eulerforge.plugins import load_registry
from eulerforge.training.coverage import rehearse

REGISTRY = load_registry()
PRESETS = {preset.name: preset.path for preset in list_presets()}
EXPERTS = {"experts.gate_up", "experts.down"}
FFN = {"ffn.gate", "ffn.up", "ffn.down"}
ATTENTION = {"attn.q", "attn.k", "attn.v", "attn.o"}
LINEAR = {"linear_attn.qkv", "linear_attn.out"}
SHARED = {"shared_expert.gate", "shared_expert.up", "shared_expert.down"}

REACHED: dict[str, set[str]] = {
    "quickstart": FFN | {"attn.q", "attn.v"},
    "smollm2_135m_dense_lora_sft": FFN | {"attn.q", "attn.v"},
    "llama3.2_1b_dense_lora_sft": FFN | {"attn.q", "attn.v"},
    "llama3.2_1b_int4_dense_lora_sft": FFN | {"attn.q", "attn.v"},
    "llama3.1_8b_dense_lora_sft": FFN | ATTENTION,
    "llama3.1_8b_int4_dense_lora_sft": FFN | ATTENTION,
    "qwen3_0.6b_dense_lora_sft": FFN | {"attn.q", "attn.v"},
    "qwen3_8b_int4_dense_lora_sft": FFN | ATTENTION,
    "qwen3_30b_a3b_dense_lora_sft": EXPERTS | {"attn.q", "attn.v"},
    "qwen3_30b_a3b_int4_dense_lora_sft": EXPERTS | {"attn.q", "attn.v"},
    "qwen3.5_0.8b_dense_lora_sft": FFN | {"attn.q", "attn.v"},
    "qwen3.5_0.8b_hybrid_dense_lora_sft": FFN | {"attn.q", "attn.v", "linear_attn.qkv"},
    "qwen3.5_0.8b_int4_dense_lora_sft": FFN | ATTENTION | LINEAR,
    "qwen3.5_35b_a3b_dense_lora_sft": EXPERTS | SHARED | {"attn.q", "attn.v", "linear_attn.qkv"},
    "gemma3_1b_dense_lora_sft": FFN | {"attn.q", "attn.v"},
    "gemma3_4b_int4_dense_lora_sft": FFN | ATTENTION,
    "mixtral_8x7b_dense_lora_sft": EXPERTS | {"attn.q", "attn.v"},
    "mixtral_8x7b_int4_dense_lora_sft": EXPERTS | {"attn.q", "attn.v"},
    "mixtral_8x7b_attention_dense_lora_sft": ATTENTION,
}


def run_of(name: str, *sets: str) -> Any:
    changes = ["device=cpu", *sets]
    return load_run_config(str(PRESETS[name]), changes, strategy_configs=REGISTRY.strategy_config).run


def test_every_preset_and_every_config_is_looked_at() -> None:
    assert set(REACHED) == set(PRESETS)
    files = [path for path in bundled_folder().iterdir() if path.suffix in (".toml", ".yml", ".yaml")]
    assert len(files) == len(PRESETS), "two presets share a name"
    assert {path.suffix for path in files} == {".toml", ".yml"}
    assert set(HUB_NAMES.values()) == set(NAMES)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--preset", name, "--validate-only"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{name}: the configuration is valid\n"
    assert shown.err == ""


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reaches_all_that_it_names(name: str, tmp_path: Path) -> None:
    hub_name = run_of(name).model_name
    run = run_of(name, f"model_name={config_folder(tmp_path, HUB_NAMES[hub_name])}")
    report = rehearse(run, REGISTRY)
    assert isinstance(report, InjectionReport)
    assert {site.role for site in report.sites} == REACHED[name]
    # wherever a layer has a place of the role, it is adapted
    assert all(row["reached"] in ([], row["present"]) for row in report.coverage().values())
    assert report.layers == tuple(range(report.depth))
    if name == "qwen3.5_0.8b_dense_lora_sft":  # the tutorial's pair
        assert len(report.gaps) == 2
    else:
        assert not report.gaps
        right = REGISTRY.backbone_for(model_types(meta_model(run).config)[0])
        assert right is not None
        assert right.name == run.backbone
