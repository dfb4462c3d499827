"""However a step's rows are cut, its loss and its gradient are those of one row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eulerforge.data.packing import Layout
from eulerforge.data.tokenized import TokenizedRows
from eulerforge.testing.tiny_models import tiny_model
from eulerforge.training.forward import label_token_loss
from eulerforge.training.isolation import isolate
from eulerforge.training.recompute import enable_gradient_checkpointing

from .packed_rows import random_rows, rows_under
from .test_isolation import MixerAdapter, spec

LENGTHS = [9, 2, 30, 17, 4, 11, 25, 6]
CUTS = {
    "flat": Layout(packing="flat", batch_size=2, max_length=32, token_budget=64, pad_id=0),
    "flat, similar lengths": Layout(
        packing="flat", batch_size=2, max_length=32, token_budget=64, pad_id=0, by_length=True
    ),
    "bins": Layout(packing="bins", batch_size=2, max_length=32, token_budget=1, pad_id=0),
    "bucketed": Layout(packing="off", batch_size=2, max_length=32, token_budget=1, pad_id=0),
    "one batch": Layout.padded(8, 0),
}
SHARED = Layout(packing="flat", batch_size=2, max_length=64, token_budget=100, pad_id=0, share_prefixes=True)


def reference(model: Any, rows: TokenizedRows) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over the label tokens and its gradients, by plain transformers logits, one row at a time."""
    total, count = torch.zeros(()), 0
    for index in range(len(rows)):
        ids, labelled = (torch.tensor(part.astype("int64")) for part in rows.row(index))
        labels = torch.where(labelled != 0, ids, -100)[1:]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return step_of(model, total / count)


def step_of(model: Any, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), gradients


def cut_step(model: Any, rows: TokenizedRows, layout: Layout) -> tuple[float, dict[str, torch.Tensor]]:
    """The same as the training loop does it."""
    parts = [layout.batch(rows, lines, "cpu") for lines in layout.cut(rows, range(len(rows)))]
    count = sum(batch.label_tokens for batch in parts)
    loss = 0.0
    for batch in parts:
        loss_sum, labels = label_token_loss(model, batch)
        assert labels == batch.label_tokens
        (loss_sum / count).backward()
        loss += float(loss_sum.detach()) / count
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss, gradients


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma3", "mixtral", "qwen3_5"])
def test_every_cut_gives_the_plain_loss_and_gradient(family: str) -> None:
    rows, model = random_rows(LENGTHS), tiny_model(family)
    model.train()
    loss, gradients = reference(model, rows)
    isolate(model, spec("gather"), MixerAdapter())
    for name, layout in CUTS.items():
        found, ours = cut_step(model, rows, layout)
        assert found == pytest.approx(loss, abs=1e-5), name
        assert ours.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            scale = float(gradient.abs().max()) + 1e-6
            assert float((ours[parameter] - gradient).abs().max()) / scale < 1e-4, (name, parameter)


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma3", "mixtral"])
def test_a_prefix_that_rows_share_gives_the_plain_loss_and_gradient(family: str) -> None:
    """Two prefixes, of 20 and 17 tokens, rows without one, and several micro-batches."""
    rows, model = rows_under([20] * 5 + [17] * 3 + [0] * 2, [9, 2, 30, 17, 1, 25, 6, 11, 20, 4]), tiny_model(family)
    model.train()
    loss, gradients = reference(model, rows)
    isolate(model, spec("attention"), MixerAdapter())
    parts = [SHARED.batch(rows, lines, "cpu") for lines in SHARED.cut(rows, range(len(rows)))]
    assert len(parts) > 1
    assert sum(batch.tokens for batch in parts) == rows.token_count
    assert sum(batch.input_ids.numel() for batch in parts) < rows.token_count - 50
    found, ours = cut_step(model, rows, SHARED)
    assert found == pytest.approx(loss, abs=1e-5)
    for parameter, gradient in gradients.items():
        scale = float(gradient.abs().max()) + 1e-6
        assert float((ours[parameter] - gradient).abs().max()) / scale < 1e-4, parameter


@pytest.mark.parametrize("window", [9, 24, 31])
def test_a_window_that_ends_within_a_shared_prefix(window: int) -> None:
    """24 is longer than the prefix of 20 and every rest, and shorter than the rows."""
    model = tiny_model("gemma3", sliding_window=window)
    rows = rows_under([20] * 3, [18, 15, 12])
    loss, gradients = reference(model, rows)
    isolate(model, spec("attention"), MixerAdapter())
    assert len(SHARED.cut(rows, range(3))) == 1
    found, ours = cut_step(model, rows, SHARED)
    assert found == pytest.approx(loss, abs=1e-5)
    for parameter, gradient in gradients.items():
        assert float((ours[parameter] - gradient).abs().max()) < 1e-4 * (float(gradient.abs().max()) + 1e-6), parameter


@pytest.mark.parametrize("family", ["llama3", "gemma3", "qwen3_5"])
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    rows, model = random_rows(LENGTHS), tiny_model(family)
    isolate(model, spec("gather"), MixerAdapter())
    model.train()
    loss, gradients = cut_step(model, rows, CUTS["flat"])
    enable_gradient_checkpointing(model)
    again, others = cut_step(model, rows, CUTS["flat"])
    assert again == loss
    for name, gradient in gradients.items():
        assert torch.equal(others[name], gradient), name


def test_the_last_token_of_a_document_predicts_nothing() -> None:
    rows, model = random_rows([3, 3]), tiny_model("llama3")
    layout = CUTS["flat"]
    (lines,) = layout.cut(rows, [0, 1])
    batch = layout.batch(rows, lines, "cpu")
    isolate(model, spec("attention"), MixerAdapter())
    loss, count = label_token_loss(model, batch)
    separate = [label_token_loss(model, Layout.padded(1, 0).batch(rows, [[index]], "cpu")) for index in (0, 1)]
    assert count == sum(number for _, number in separate)
    assert float(loss.detach()) == pytest.approx(sum(float(part.detach()) for part, _ in separate), rel=1e-6)
