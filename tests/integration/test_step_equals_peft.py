"""Optimizer steps of ours against PEFT's wrapper, transformers' own loss and torch's plain AdamW."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import tinyrun
import torch

TARGETS = ["gate_proj", "up_proj", "down_proj", "q_proj", "v_proj"]


def peft_model(folder: Path, run: Any) -> dict[str, Any]:
    """A PEFT model whose adapters start as ours do: the model, and its parameters under our names."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name that is on its way out
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config).train()
    ours = dict(run.model.named_parameters())
    theirs = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            parameter.data.copy_(ours[own])
            theirs[own] = parameter
    assert set(theirs) == set(run.phases.trained_names)
    return {"model": model, "parameters": theirs}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_steps_equal_those_of_peft_and_torch(tmp_path: Path, family: str, steps: int) -> None:
    from eulerforge.data.batches import BatchPlan, collate

    tinyrun.prepare(tmp_path, family)
    run = tinyrun.assembled(
        tmp_path, family, training__batch_size=2, training__grad_accum_steps=4, training__lr=1e-3,
        training__scheduler="constant", training__max_grad_norm=0.2, training__weight_decay=0.1,
    )  # fmt: skip
    tinyrun.randomize_B(run)
    rival = peft_model(tmp_path, run)
    start = {name: parameter.detach().clone() for name, parameter in rival["parameters"].items()}
    parameters = list(rival["parameters"].values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, foreach=False, fused=False)
    plan = BatchPlan(run.datasets.train, 8, 1, run.config.seed)
    losses, norms = [], []
    for step in range(steps):
        batch = collate(run.datasets.train, plan.step_rows(step)[0], run.pad_id, "cpu")
        loss = rival["model"](
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=tinyrun.labels_of(batch),
            use_cache=False,
        ).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 0.2)))
        losses.append(float(loss.detach()))
        optimizer.step()

    tinyrun.train_steps(run, steps)
    rows = tinyrun.metrics(run.out)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-4)
    assert min(norms) > 0.2, "clipping is part of what is compared"
    ours = dict(run.model.named_parameters())
    for name, parameter in rival["parameters"].items():
        assert not torch.equal(parameter, start[name])
        torch.testing.assert_close(ours[name], parameter, rtol=0, atol=1e-5)
