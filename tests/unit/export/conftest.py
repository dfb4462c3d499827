"""A trained run that no training made: a tiny base on disk with adapters of random values in its live model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from eulerforge.api import InjectionReport
from eulerforge.config.schema import RunConfig
from eulerforge.export.rundir import Location, TrainedRun
from eulerforge.lora.apply import apply_injection
from eulerforge.lora.state import adapter_state
from eulerforge.lora.wrap import adapted_modules, wrap_linear
from eulerforge.models.source import BaseSource
from eulerforge.plugins import load_registry
from eulerforge.training.manifest import TrainState
from eulerforge.training.receipt import base_weights

REGISTRY = load_registry()
TARGETS = ("mlp.gate_proj", "mlp.down_proj", "self_attn.q_proj")


def as_run(folder: Path, base: Path, live: Any, report: InjectionReport) -> TrainedRun:
    """A run in ``folder`` with that live model over that base folder."""
    (folder / "final").mkdir(parents=True)
    return TrainedRun(
        location=Location(folder=folder, checkpoint=folder / "final", state=TrainState(step=3), injection={}),
        run=RunConfig(model_name="m", backbone="auto", injection=None),
        model=live,
        tokenizer=None,
        source=BaseSource(kind="folder", name=str(base), folder=base),
        weights=base_weights(base),
        device=torch.device("cpu"),
        dtype=torch.float32,
        report=report,
        trained_base={},
    )


@pytest.fixture
def make_family_run(tmp_path: Path) -> Callable[..., TrainedRun]:
    """A run of any family, injected by dense_lora as a preset would have it: feed-forward and attention."""

    def make(
        family: str,
        *,
        dtype: torch.dtype = torch.float32,
        shard_size: str | None = None,
        tensors: dict[str, torch.Tensor] | None = None,
        keywords: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
    ) -> TrainedRun:
        from transformers import AutoModelForCausalLM

        base = tmp_path / "base"
        tiny.tiny_model(family).to(dtype).save_pretrained(
            base, **({"max_shard_size": shard_size} if shard_size else {})
        )
        tiny.tiny_tokenizer().save_pretrained(base)
        if tensors:
            path = base / "model.safetensors"
            save_file(load_file(path) | tensors, path, metadata={"format": "pt"})
        live = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        config = REGISTRY.strategy_config("dense_lora")
        attention = attrs.evolve(config().attn_lora, enabled=True)
        injection = config(target_keywords=keywords, lora_r=2, lora_alpha=8.0, attn_lora=attention)
        run = RunConfig(model_name="m", backbone="auto", injection=injection)
        report = apply_injection(run, REGISTRY, live).report
        random = torch.Generator().manual_seed(7)
        for tensor in adapter_state(live).values():
            tensor.normal_(std=0.1, generator=random)
        return as_run(tmp_path / "run", base, live, report)

    return make


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
        report = InjectionReport(strategy="dense_lora", layers=(0, 1, 2), depth=3, sites=())
        return as_run(tmp_path / "run", base, live, report)

    return make
