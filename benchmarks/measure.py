"""What every rival reports in the same way: one JSON line per step, one at the end, on a file of its own."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

IGNORED = -100
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
SQUARE = 2048
"""Rows and columns of the product whose rate is the machine's."""


class StepClock:
    """Wall and CPU seconds of each optimizer step; ``tokens`` are real tokens, padding left out.

    With ``products`` the rate of a large matrix product in that precision is measured between the steps.
    """

    def __init__(self, path: Path, *, products: torch.dtype | None = None) -> None:
        self.path = path
        self.products = products
        self.peak_rss = 0
        self.peak_cuda: int | None = None
        path.write_text("", encoding="utf-8")
        self.mark()

    def mark(self) -> None:
        if self.products is not None:
            self._rate = 2 * SQUARE**3 / product_seconds(SQUARE, SQUARE, SQUARE, self.products, tries=4)
        self._wall, self._cpu, self._system = time.perf_counter(), time.process_time(), _system_seconds()

    def step(self, number: int, loss: float, tokens: int) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        # kept per step, so that what is measured after the training does not count
        self.peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.peak_cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        system = _system_seconds() - self._system
        row = {"step": number, "loss": loss, "tokens": tokens, "wall": wall, "cpu": cpu, "system": system}
        before = self._rate if self.products is not None else None
        self.mark()
        self._write(row if before is None else {**row, "product_rate": (before + self._rate) / 2})

    def done(self, **facts: Any) -> None:
        self._write({"done": True, "peak_rss": self.peak_rss, "peak_cuda": self.peak_cuda, **facts})

    def _write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _system_seconds() -> float:
    """CPU seconds that the kernel worked for this process: most are for pages that it touches for the first time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_stime


def product_seconds(rows: int, inputs: int, outputs: int, dtype: torch.dtype, *, tries: int) -> float:
    """CPU seconds of a product (rows, inputs) x (outputs, inputs)^T, the best of some."""
    generator = torch.Generator().manual_seed(0)  # torch's own would change the run's dropout
    x, weight = (torch.randn(count, inputs, generator=generator).to(dtype) for count in (rows, outputs))
    out, best = torch.empty(rows, outputs, dtype=dtype), float("inf")
    for _ in range(tries):
        began = time.process_time()
        torch.mm(x, weight.T, out=out)
        best = min(best, time.process_time() - began)
    return best


@torch.no_grad()
def plain_held_out_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Mean loss per label token, one row at a time, by full logits in fp32: the same few lines for every rival."""
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=device)
        labels = torch.tensor(row["labels"], device=device)[1:]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        count += int((labels != IGNORED).sum())
    return total / count
