"""A mixture in 4 bits: ours beside transformers' own loading with bitsandbytes and PEFT, which leaves the experts.

A small Mixtral in bf16 on the disk; each cell is a process of its own that loads it in NF4 with fp32 products, puts
LoRA on the attention or on the experts, and trains a few steps on random tokens in a plain loop; the rivals in turn,
one thread. CPU seconds are what counts on a machine that others use too.

    python benchmarks/quantized_experts.py       # writes results/quantized_experts.json and prints the table
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experts import MIB, cell, peak_bytes, processor, train, trained_numbers

RESULTS = Path(__file__).with_name("results") / "quantized_experts.json"
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
RANK, ALPHA = 8, 16.0
BATCH, LENGTH = 2, 256
RIVALS, TARGETS = ("eulerforge", "peft"), ("attention", "experts")
ATTENTION, EXPERTS = ("q_proj", "v_proj"), ("gate_up_proj", "down_proj")


def save_base(folder: Path) -> None:
    """The Mixtral, as a download would lie there: each expert by itself."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from eulerforge.testing.tiny_models import tiny_tokenizer

    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**SIZES)).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def ours(folder: Path, targets: str) -> Any:
    import torch

    from eulerforge.config.schema import LoadPrecision, ModelConfig, RunConfig
    from eulerforge.lora.wrap import wrap_experts, wrap_linear
    from eulerforge.models.load import load_model

    precision = LoadPrecision(mode="int4", compute_dtype="fp32")
    run = RunConfig(model_name=str(folder), model=ModelConfig(load_precision=precision))
    model = load_model(run, device=torch.device("cpu")).model.requires_grad_(False)
    for layer in range(SIZES["num_hidden_layers"]):
        if targets == "experts":
            wrap_experts(model, f"model.layers.{layer}.mlp.experts", EXPERTS, r=RANK, alpha=ALPHA)
            continue
        for name in ATTENTION:
            wrap_linear(model, f"model.layers.{layer}.self_attn.{name}", r=RANK, alpha=ALPHA)
    return model


def theirs(folder: Path, targets: str) -> Any:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=bits, dtype=torch.float32, device_map={"": "cpu"}
    )
    chosen: dict[str, Any] = {"target_modules": list(ATTENTION)}
    if targets == "experts":
        chosen = {"target_modules": [], "target_parameters": [f"mlp.experts.{name}" for name in EXPERTS]}
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **chosen))


def measure(rival: str, targets: str, folder: Path, steps: int) -> dict[str, Any]:
    """One cell: load, train a few steps, and say what they took beyond the libraries."""
    import bitsandbytes  # noqa: F401 - its own memory is not the model's
    import torch
    from transformers.models.mixtral import modeling_mixtral  # noqa: F401

    torch.set_num_threads(1)
    before = peak_bytes(reset=True)
    clock = time.process_time()
    model = (ours if rival == "eulerforge" else theirs)(folder, targets).train()
    loading = time.process_time() - clock
    load_peak, weights = peak_bytes(), peak_bytes(reset=True)
    ids = torch.randint(5, SIZES["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    losses, seconds, _ = train(model, ids, steps)
    return {
        "rival": rival,
        "targets": targets,
        "parameters": trained_numbers(model),
        "loading_cpu_seconds": loading,
        "load_peak_mib": (load_peak - before) / MIB,
        "loaded_mib": (weights - before) / MIB,
        "step_peak_mib": (peak_bytes() - before) / MIB,
        "tokens_per_cpu_second": BATCH * LENGTH * steps / seconds,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def table(cells: list[dict[str, Any]]) -> str:
    """Every cell as Markdown."""
    lines = [
        "| LoRA on | rival | loaded MiB | peak of loading MiB | peak of steps MiB | tokens / CPU s | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in cells:
        lines.append(
            f"| {run['targets']} | {run['rival']} | {run['loaded_mib']:.0f} | {run['load_peak_mib']:.0f}"
            f" | {run['step_peak_mib']:.0f} | {run['tokens_per_cpu_second']:.0f}"
            f" | {run['first_loss']:.3f} to {run['last_loss']:.3f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per process")
    parser.add_argument("--cell", nargs=3, metavar=("RIVAL", "TARGETS", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        rival, targets, folder = arguments.cell
        print(json.dumps(measure(rival, targets, Path(folder), steps=arguments.steps)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        save_base(Path(folder))
        cells = [
            cell(__file__, rival, targets, folder, steps=arguments.steps) for targets in TARGETS for rival in RIVALS
        ]
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python benchmarks/quantized_experts.py --steps {arguments.steps}",
        "device": f"{processor()}, 1 thread",
        "shared_machine": True,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "sizes": {**SIZES, "rank": RANK, "batch": BATCH, "length": LENGTH},
        "cells": cells,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(cells))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
