"""A trained run that no training made: a tiny base on disk with adapters of random values in its live model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from eulerforge.api import InjectionReport
from eulerforge.config.schema import ModelConfig
from eulerforge.export.rundir import Location, TrainedRun
from eulerforge.lora.wrap import adapted_modules, wrap_linear
from eulerforge.models.source import BaseSource
from eulerforge.training.checkpoint import TrainState
from eulerforge.training.receipt import base_weights

TARGETS = ("mlp.gate_proj", "mlp.down_proj", "self_attn.q_proj")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., TrainedRun]:
    def make(
        family: str = "llama",
        *,
        dtype: torch.dtype = torch.float32,
        ranks: tuple[int, ...] = (4, 4, 4),
        use_rslora: bool = False,
        shard_size: str | None = None,
        **changes: Any,
    ) -> TrainedRun:
        from transformers import AutoModelForCausalLM

        base = tmp_path / "base"
        model = tiny.tiny_model(family, 0, **changes).to(dtype)
        model.save_pretrained(base, **({"max_shard_size": shard_size} if shard_size else {}))
        tiny.tiny_tokenizer().save_pretrained(base)
        live = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        live.requires_grad_(False)
        random = torch.Generator().manual_seed(7)
        for layer in range(3):
            for target, rank in zip(TARGETS, ranks, strict=True):
                path = f"model.layers.{layer}.{target}"
                wrap_linear(live, path, r=rank, alpha=8.0, use_rslora=use_rslora, generator=random)
        for _, module in adapted_modules(live):
            module.lora_B.data.normal_(std=0.05, generator=random)  # type: ignore[union-attr,operator]
        folder = tmp_path / "run"
        (folder / "final").mkdir(parents=True)
        return TrainedRun(
            location=Location(folder=folder, checkpoint=folder / "final", state=TrainState(step=3), injection={}),
            run=SimpleNamespace(model=ModelConfig()),  # type: ignore[arg-type]
            model=live,
            tokenizer=None,
            source=BaseSource(kind="folder", name=str(base), folder=base),
            weights=base_weights(base),
            device=torch.device("cpu"),
            dtype=torch.float32,
            report=InjectionReport(strategy="dense_lora", layers=(0, 1, 2), depth=3, sites=()),
            trained_base={},
        )

    return make
