"""Held-out loss: the mean over all label tokens of a data set, whatever the batches are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import attrs
import torch

from eulerforge.data.packing import Layout
from eulerforge.training.forward import label_token_loss


@attrs.frozen(kw_only=True)
class Evaluation:
    """``loss`` is in nats per label token, ``tokens`` counts all real tokens, ``seconds`` is wall-clock time."""

    loss: float
    tokens: int
    label_tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def to_json(self) -> dict[str, float]:
        return {**attrs.asdict(self), "perplexity": self.perplexity}


class EvaluationStopped(Exception):
    """A stop was asked for before all rows were measured; there is no result."""


@torch.no_grad()
def held_out_loss(
    model: Any,
    rows: Any,
    layout: Layout,
    device: torch.device,
    *,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Loss of ``model`` on every row of a TokenizedRows; its train or eval mode is put back afterwards.

    The longest rows go first, so that a batch that does not fit fails at once.

    Raises:
        EvaluationStopped: ``stop_wanted`` became true between two batches.
    """
    began, was_training = time.perf_counter(), model.training
    total, tokens, label_tokens = 0.0, 0, 0
    model.eval()
    try:
        for lines in layout.cut(rows, range(len(rows))):
            if stop_wanted():
                raise EvaluationStopped
            batch = layout.batch(rows, lines, device)
            loss, count = label_token_loss(model, batch)
            total, tokens, label_tokens = total + float(loss), tokens + batch.tokens, label_tokens + count
    finally:
        model.train(was_training)
    return Evaluation(
        loss=total / max(1, label_tokens),
        tokens=tokens,
        label_tokens=label_tokens,
        seconds=time.perf_counter() - began,
    )
