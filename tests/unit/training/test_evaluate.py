"""Held-out loss, against transformers' own loss of one row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from eulerforge.data.packing import Layout
from eulerforge.training.evaluate import Evaluation, held_out_loss


@pytest.mark.parametrize("packing", ["flat", "off"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_mean_over_label_tokens_whatever_the_batches(
    make_run: Callable[..., Any], batch_size: int, packing: str
) -> None:
    run = make_run(
        data__validation__size=7,
        injection__lora_dropout=0.5,
        evaluation__batch_size=batch_size,
        data__max_length=64,
        data__max_cut_answers=1,
        data__packing=packing,
    )
    layout = run.eval_layout
    assert layout.packing == packing
    rows, model = run.datasets.validation, run.model
    model.eval()
    total, count, tokens = 0.0, 0, 0
    for index in range(len(rows)):
        ids, labelled = rows.row(index)
        batch = torch.tensor(ids.astype("int64"))[None]
        labels = torch.where(torch.tensor(labelled.astype(bool)), batch, -100)
        labels[:, 0] = -100
        with torch.no_grad():
            loss = model(batch, labels=labels, use_cache=False).loss
        total += float(loss) * int((labels != -100).sum())
        count, tokens = count + int((labels != -100).sum()), tokens + batch.numel()
    model.train()
    result = held_out_loss(model, rows, layout, run.device)
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert (result.label_tokens, result.tokens) == (count, tokens)
    assert result.seconds > 0
    assert model.training, "dropout was off for the measure alone"


def test_the_mode_comes_back_even_when_it_fails(make_run: Callable[..., Any]) -> None:
    run = make_run(data__validation__size=2)
    run.model.train()
    with pytest.raises(IndexError):
        held_out_loss(run.model, run.datasets.validation, Layout.padded(2, 10**6), run.device)
    assert run.model.training


def test_perplexity_is_the_exponential_and_never_overflows() -> None:
    values = {"tokens": 1, "label_tokens": 1, "seconds": 0.0}
    assert Evaluation(loss=2.0, **values).perplexity == pytest.approx(math.e**2)  # type: ignore[arg-type]
    assert math.isfinite(Evaluation(loss=1e6, **values).perplexity)  # type: ignore[arg-type]
    assert Evaluation(loss=0.0, **values).to_json()["perplexity"] == 1.0  # type: ignore[arg-type]
