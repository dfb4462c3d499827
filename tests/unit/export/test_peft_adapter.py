"""The PEFT folder, loaded by PEFT itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch

from eulerforge.errors import UsageError
from eulerforge.export.peft_adapter import write_peft
from eulerforge.export.rundir import TrainedRun

MakeRun = Callable[..., TrainedRun]
IDS = torch.tensor([[5, 9, 33, 70, 12, 101, 4]])


@pytest.mark.parametrize(
    ("family", "ranks", "use_rslora"),
    [("llama", (4, 4, 4), False), ("qwen3", (4, 4, 2), False), ("llama", (8, 2, 8), True)],
)
def test_peft_computes_what_the_live_model_does(
    make_run: MakeRun, tmp_path: Path, family: str, ranks: tuple[int, ...], use_rslora: bool
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    run = make_run(family, ranks=ranks, use_rslora=use_rslora)
    write_peft(run, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(run.source.folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of keys that it misses
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name that is on its way out
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(run.source.folder, dtype=torch.float32).eval()(IDS).logits
        live, theirs = run.model(IDS).logits, model(IDS).logits
    torch.testing.assert_close(theirs, live, rtol=1e-5, atol=1e-5)
    assert (live - plain).abs().max() > 1e-3


def test_the_config_states_the_commonest_rank_and_lists_the_others(make_run: MakeRun, tmp_path: Path) -> None:
    write_peft(make_run(ranks=(4, 4, 2)), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)
    assert config["rank_pattern"] == {f"model.layers.{layer}.self_attn.q_proj": 2 for layer in range(3)}
    assert config["alpha_pattern"] == {}
    assert len(config["target_modules"]) == 9


def test_an_adapter_cannot_hold_trained_base_tensors(make_run: MakeRun, tmp_path: Path) -> None:
    run = attrs.evolve(make_run(), trained_base={"model.norm.weight": torch.zeros(32)})
    with pytest.raises(UsageError, match=r"model\.norm\.weight"):
        write_peft(run, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
