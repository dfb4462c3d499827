"""Every family through the real command: what is adapted learns, the base stays as it is, a merge computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tinyrun
import torch
from tiny import save_tiny, write_rows

from eulerforge.cli.main import main
from eulerforge.export.rundir import open_run
from eulerforge.lora.merge import merge_in_place
from eulerforge.lora.state import adapter_state
from eulerforge.lora.wrap import adapted_modules
from eulerforge.models.linear_ops import linear_ops_from
from eulerforge.models.meta import meta_model
from eulerforge.plugins import load_registry
from eulerforge.testing.tiny_models import FAMILIES
from eulerforge.training.coverage import inject_and_plan

REGISTRY = load_registry()
BACKBONES = {
    "llama3": "llama3",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "qwen3_5": "qwen3.5",
    "qwen3_5_moe": "qwen3.5",
    "qwen3_5_multimodal": "qwen3.5",
    "qwen3_5_moe_multimodal": "qwen3.5",
    "gemma3": "gemma3",
    "gemma3_multimodal": "gemma3",
    "mixtral": "mixtral",
}
STEPS = 20
CHANGES: dict[str, Any] = {
    "backbone": "auto",
    "injection__attn_lora__keywords": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "training__max_train_steps": STEPS,
    "training__batch_size": 4,
    "training__log_steps": STEPS,
    "checkpoint__include_base": False,
}


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name.replace(".base_layer.", "."): tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_merges(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_tiny(tmp_path / "base", family)
    write_rows(tmp_path / "rows.jsonl", 24)
    assert main(tinyrun.arguments(tmp_path, **CHANGES)) == 0

    trained = open_run(tmp_path / "run", registry=REGISTRY, device="cpu")
    assert not trained.warnings
    assert {type(module).__name__ for _, module in adapted_modules(trained.model)} <= {"LoRALinear", "LoRAExperts"}
    # what the same seed drew before the first step
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    base = tensors(fresh)
    inject_and_plan(trained.run, REGISTRY, fresh)
    before, after = adapter_state(fresh), adapter_state(trained.model)
    assert before.keys() == after.keys()
    still = [name for name, tensor in after.items() if torch.equal(tensor, before[name])]
    assert not still, f"{len(still)} of {len(after)} adapter tensors did not change"
    now = tensors(trained.model)
    assert all(torch.equal(tensor, now[name]) for name, tensor in base.items())

    ids = torch.randint(5, 100, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()(input_ids=ids)
        live = trained.model.eval()(input_ids=ids, use_cache=False).logits
        assert (live - plain.logits).abs().max() > 1e-3, "the adapters change nothing"
        merge_in_place(trained.model, linear_ops_from(REGISTRY))
        merged = trained.model(input_ids=ids, use_cache=False).logits
    assert (merged - live).abs().max() < 1e-5
    assert not list(adapted_modules(trained.model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_has_one_backbone_and_its_rehearsal_reaches_everything(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", family)
    run = tinyrun.loaded(tmp_path, **{**CHANGES, "data__path": None}).run
    injected, _, _ = inject_and_plan(run, REGISTRY, meta_model(run))
    assert injected.backbone.name == BACKBONES[family]
    assert not injected.warnings
    for role, row in injected.report.coverage().items():
        assert row["reached"] == ([] if role == "linear_attn.gate" else row["present"])
