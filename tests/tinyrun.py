"""A run of a tiny model with the real plugins: its folder, its settings, and the ways to start it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny

BACKBONES = {"llama": "llama3", "qwen3": "qwen3", "qwen3_moe": "qwen3", "mixtral": "mixtral"}
FILES = ("adapter.safetensors", "optimizer.safetensors")


def prepare(folder: Path, family: str = "llama", *, rows: int = 24, **sizes: Any) -> Path:
    """``base`` (a tiny model with its tokenizer) and ``rows.jsonl`` in ``folder``."""
    tiny.save_tiny(folder / "base", family, **sizes)
    tiny.write_rows(folder / "rows.jsonl", rows)
    return folder


def settings(folder: Path, family: str = "llama", **changes: Any) -> list[str]:
    """What ``--set`` takes, one string per key; ``training__lr=1`` changes ``training.lr``, None takes a key out."""
    keys: dict[str, Any] = {
        "model_name": str(folder / "base"),
        "backbone": BACKBONES[family],
        "device": "cpu",
        "model.load_precision.mode": "fp32",
        "output_dir": str(folder / "run"),
        "injection.lora_r": 4,
        "injection.lora_alpha": 8,
        "injection.attn_lora.enabled": True,
        "data.path": str(folder / "rows.jsonl"),
        "data.max_length": 128,
        "training.lr": 0.02,
        "training.max_train_steps": 4,
        "training.batch_size": 2,
        "training.log_steps": 1,
    }
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{key}={json.dumps(value)}" for key, value in keys.items() if value is not None]


def arguments(folder: Path, family: str = "llama", **changes: Any) -> list[str]:
    """The words of ``eulerforge train`` for these settings."""
    words = ["train"]
    for setting in settings(folder, family, **changes):
        words += ["--set", setting]
    return words


def loaded(folder: Path, family: str = "llama", **changes: Any) -> Any:
    """The LoadedConfig of these settings."""
    from eulerforge.config import load_run_config
    from eulerforge.plugins import load_registry

    return load_run_config(None, settings(folder, family, **changes), strategy_configs=load_registry().strategy_config)


def assembled(
    folder: Path,
    family: str = "llama",
    *,
    estimates: bool = False,
    say: Callable[[str], None] = lambda text: None,
    **changes: Any,
) -> Any:
    """A Run that is ready to train; ``folder`` must be prepared; ``estimates`` and ``say`` as in ``assemble``."""
    from eulerforge.plugins import load_registry
    from eulerforge.training.assemble import assemble

    config = loaded(folder, family, **changes).run
    return assemble(config, load_registry(), out=Path(config.output_dir), estimates=estimates, say=say)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what a clock or the machine put there."""
    timed = ("seconds", "tokens_per_s", "peak_memory_bytes")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]


def train_steps(run: Any, steps: int) -> Any:
    """Train an assembled run in its real loop; gives back the optimizer. Nothing but metrics.jsonl is written."""
    from eulerforge.training.loop import train_loop
    from eulerforge.training.manifest import TrainState
    from eulerforge.training.metrics import MetricsLog
    from eulerforge.training.optimizer import make_optimizer
    from eulerforge.training.progress import Progress

    optimizer = make_optimizer(run.model, run.phases.groups, run.config.training)
    run.out.mkdir(parents=True, exist_ok=True)
    with MetricsLog(run.out) as log:
        train_loop(
            run,
            optimizer,
            TrainState(),
            total_steps=steps,
            log=log,
            progress=Progress(steps, steps),
            save=lambda: run.out,
        )
    return optimizer


def randomize_B(run: Any, seed: int = 5) -> None:
    """Give every lora_B values, so that every adapter tensor has a gradient that is not zero."""
    import torch

    random = torch.Generator().manual_seed(seed)
    for name, parameter in run.model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.05, generator=random)


def labels_of(batch: Any) -> Any:
    """The labels (B, T) that transformers and the oracles take: not shifted, -100 where nothing is trained."""
    import torch

    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.label_at + 1] = batch.next_labels
    return labels
