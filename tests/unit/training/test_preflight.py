"""--preflight: every phase is tried, gradients are proven, sizes are right, and nothing has changed afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from eulerforge.errors import ConfigError, RunError
from eulerforge.training.preflight import preflight, preflight_lines
from eulerforge.training.recompute import Kept

PHASES = [{"step": 0, "trainable": ["lora"]}, {"step": 2, "trainable": ["attn_lora"]}]


def test_numbers_are_those_of_the_model(make_run: Callable[..., Any]) -> None:
    run = make_run(training__phases=PHASES, estimates=True)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    result = preflight(run)
    # 3 layers: gate and up (32 -> 48), down (48 -> 32), rank 4; q (32 -> 32) and v (32 -> 16)
    lora = 3 * 4 * 3 * (32 + 48)
    attention = 3 * 4 * ((32 + 32) + (32 + 16))
    assert result["groups"] == {
        "lora": {"tensors": 18, "parameters": lora},
        "attn_lora": {"tensors": 12, "parameters": attention},
    }
    assert result["phases"] == [{"step": 0, "groups": ["lora"]}, {"step": 2, "groups": ["attn_lora"]}]
    assert result["probe"]["tensors_with_gradient"] == 30
    assert result["probe"]["batch"] == "2 rows of the data"
    base = sum(tensor.numel() for name, tensor in before.items() if "lora_" not in name)
    assert result["parameters"] == base + lora + attention
    memory = result["memory"]
    # the file's pages, and each adapted weight once more beside B, filled up to 8 columns: gate and up, down, q, v
    laid_out = 3 * (2 * 48 * (32 + 8) + 32 * (48 + 8) + 32 * (32 + 8) + 16 * (32 + 8))
    assert memory["weights"] == 4 * (base + laid_out)
    assert memory["adapters"] == 4 * (lora + attention)
    assert memory["optimizer"] == 8 * (lora + attention)
    parts = ("base", "weights", "adapters", "gradients", "optimizer", "activations", "loss", "workspace", "heap")
    assert memory["step"] == sum(memory[part] for part in parts)
    assert memory["peak"] == max(memory["step"], memory["load"])
    assert memory["fits"]
    batch = memory["largest_batch"]
    assert batch["tokens"] == batch["rows"] * batch["max_length"] > 0
    assert result["forecast"]["steps"] == 4
    assert result["forecast"]["tokens_per_s"] > 0
    assert result["forecast"]["seconds"] == pytest.approx(
        result["forecast"]["tokens"] / result["forecast"]["tokens_per_s"]
    )
    after = run.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert not run.model.training
    assert not run.out.exists()


def test_a_person_reads_groups_coverage_and_memory(make_run: Callable[..., Any]) -> None:
    run = make_run(training__phases=PHASES, estimates=True)
    text = "\n".join(preflight_lines(preflight(run), run))
    for part in (
        "18 tensors",
        "12 tensors",
        "phase from step 2: attn_lora",
        "ffn.gate",
        "3 of 3 layers",
        "MiB",
        "largest micro-batch",
        "forecast: ",
    ):
        assert part in text
    for part in ("every one of 30 trainable tensors gets a gradient", "largest micro-batch that fits", "forecast: "):
        assert part in text


def test_without_data_it_uses_made_up_tokens(make_run: Callable[..., Any], prepared: Any) -> None:
    import tinyrun

    from eulerforge.plugins import load_registry
    from eulerforge.training.assemble import assemble

    config = tinyrun.loaded(prepared, data__path=None).run
    run = assemble(config, load_registry(), out=prepared / "none", need_data=False, estimates=True)
    result = preflight(run)
    assert "made-up tokens" in result["probe"]["batch"]
    assert result["forecast"]["steps"] is None
    assert result["probe"]["loss"] == pytest.approx(torch.log(torch.tensor(128.0)).item(), rel=0.2)


def test_a_tensor_without_gradient_stops_the_run(make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    module = run.model.get_submodule("model.layers.1.mlp.up_proj")
    monkeypatch.setattr(module, "forward", module.base_layer.forward)
    with pytest.raises(RunError, match=r"2 of 30 trainable tensors get no gradient .*layers.1.mlp.up_proj.lora_A"):
        preflight(run)


def test_damaged_weights_and_half_precision_weights_that_train_are_refused(make_run: Callable[..., Any]) -> None:
    run = make_run()
    with torch.no_grad():
        run.model.get_submodule("model.norm").weight.fill_(float("nan"))
    with pytest.raises(RunError, match="loss of the base model is nan"):
        preflight(run)
    phases = [{"step": 0, "trainable": ["lora", "attn_lora", "base_ffn"]}]
    halves = {"model__load_precision__mode": "bf16", "model__load_precision__compute_dtype": "bf16"}
    with pytest.raises(ConfigError, match="base weights train in fp32 only"):
        preflight(make_run(training__phases=phases, **halves))


def test_activations_are_kept_where_the_run_keeps_them(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that fits with its activations in the main memory only must not fail in the preflight."""
    run = make_run()
    forwards: list[Any] = []

    def forward(kept: Kept, model: Any) -> Any:
        forwards.append(model)
        return nullcontext()

    monkeypatch.setattr(Kept, "forward", forward)
    preflight(run)
    assert forwards == [run.model] * 2, "the probe of the one phase, and the pass that is timed"
