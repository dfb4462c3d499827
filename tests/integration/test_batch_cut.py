"""The loss and the gradient of a step are those of its rows, however they are cut into micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tinyrun
import torch

CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]


def first_step(
    folder: Path, family: str, batch_size: int, accum: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metrics of a first step and its gradients by name, as the real loop computes them."""
    run = tinyrun.assembled(
        folder, family, output_dir=str(folder / f"run-{batch_size}x{accum}"), training__max_grad_norm=0,
        training__batch_size=batch_size, training__grad_accum_steps=accum,
    )  # fmt: skip
    tinyrun.randomize_B(run)
    optimizer = tinyrun.train_steps(run, 1)
    # the first moment after one step is (1 - beta1) * gradient
    names = run.phases.trained_names
    named = dict(run.model.named_parameters())
    gradients = {name: optimizer.state[named[name]]["exp_avg"] / (1 - 0.9) for name in names}
    return tinyrun.metrics(run.out)[0], gradients


def slow_reference(folder: Path, family: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Full logits in float64, one row at a time, without padding; divided by all label tokens at the end."""
    from eulerforge.data.batches import BatchPlan

    run = tinyrun.assembled(folder, family)
    tinyrun.randomize_B(run)
    model = run.model.double().eval()
    rows, total, count = run.datasets.train, torch.zeros((), dtype=torch.float64), 0
    for index in BatchPlan(rows, 8, 1, run.config.seed).step_rows(0)[0]:
        ids, labelled = rows.row(index)
        tokens = torch.tensor(ids.astype("int64"))
        logs = model(tokens[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
        for position in range(1, len(tokens)):
            if labelled[position]:
                total, count = total - logs[position - 1, tokens[position]], count + 1
    loss = total / count
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return float(loss.detach()), dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_cut_gives_the_loss_and_gradient_of_the_rows(tmp_path: Path, family: str) -> None:
    tinyrun.prepare(tmp_path, family)
    loss, gradients = slow_reference(tmp_path, family)
    label_tokens = set()
    for batch_size, accum in CUTS:
        row, found = first_step(tmp_path, family, batch_size, accum)
        label_tokens.add(row["label_tokens"])
        assert row["loss"] == pytest.approx(loss, rel=1e-6)
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert set(found) == set(gradients)
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0
            scale = float(gradient.abs().max())
            torch.testing.assert_close(found[name].double() / scale, gradient / scale, rtol=0, atol=1e-5)
    assert len(label_tokens) == 1
