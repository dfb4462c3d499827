"""What every rival reports in the same way: one JSON line per step, one at the end, on a file of its own."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

IGNORED = -100


class StepClock:
    """Wall and CPU seconds of each optimizer step; ``tokens`` are real tokens, padding left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.peak_rss = 0
        path.write_text("", encoding="utf-8")
        self.mark()

    def mark(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def step(self, number: int, loss: float, tokens: int) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        # kept per step, so that what is measured after the training does not count
        self.peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._write({"step": number, "loss": loss, "tokens": tokens, "wall": wall, "cpu": cpu})
        self.mark()

    def done(self, **facts: Any) -> None:
        cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        self._write({"done": True, "peak_rss": self.peak_rss, "peak_cuda": cuda, **facts})

    def _write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


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
