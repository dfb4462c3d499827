"""LoRA on fused experts, ours beside PEFT's ``target_parameters``: speed, peak memory, and bytes kept for backward.

A small Mixtral on the CPU trains on random tokens, a process of its own for every cell, the rivals in turn; one thread.
CPU seconds are what counts on a machine that others use too; the loss shows that both really train.

    python benchmarks/experts.py                 # writes results/experts.json and prints the table
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results") / "experts.json"
SIZES = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
RANK, ALPHA = 16, 32.0
BATCH, LENGTH = 4, 256
RIVALS, DTYPES = ("eulerforge", "peft"), ("float32", "bfloat16")
MIB = 2**20


def peak_bytes(*, reset: bool = False) -> int:
    """The process's highest resident memory since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def adapted(rival: str, model: Any) -> Any:
    """The model with rank-16 adapters on every expert's projections, and nothing else to train."""
    model.requires_grad_(False)
    if rival == "peft":
        import peft

        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=names)
        return peft.get_peft_model(model, config)
    from eulerforge.lora.wrap import wrap_experts

    for layer in range(SIZES["num_hidden_layers"]):
        path = f"model.layers.{layer}.mlp.experts"
        wrap_experts(model, path, ("gate_up_proj", "down_proj"), r=RANK, alpha=ALPHA)
    return model


def kept_bytes(model: Any, ids: Any) -> int:
    """Bytes that autograd keeps for one backward pass, parameters left out, every storage once."""
    import torch

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    total = sum(kept.values())
    loss.backward()
    model.zero_grad()
    return total


def trained_numbers(model: Any) -> int:
    """How many numbers train."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def train(model: Any, ids: Any, steps: int) -> tuple[list[float], float, float]:
    """The losses of a plain loop, and the CPU and wall seconds of its steps, a first one to warm up left out."""
    import torch

    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    losses, seconds, wall = [], 0.0, 0.0
    for step in range(steps + 1):
        cpu, clock = time.process_time(), time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step:
            seconds += time.process_time() - cpu
            wall += time.perf_counter() - clock
    return losses, seconds, wall


def measure(rival: str, dtype: str, steps: int) -> dict[str, Any]:
    """One cell: train a few steps and say what they took."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES)).to(getattr(torch, dtype))
    model = adapted(rival, model).train()
    ids = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    before = peak_bytes(reset=True)
    kept = kept_bytes(model, ids)
    losses, seconds, wall = train(model, ids, steps)
    tokens = BATCH * LENGTH * steps
    return {
        "rival": rival,
        "dtype": dtype,
        "parameters": trained_numbers(model),
        "tokens_per_cpu_second": tokens / seconds,
        "tokens_per_wall_second": tokens / wall,
        "peak_growth_mib": (peak_bytes() - before) / MIB,
        "kept_for_backward_mib": kept / MIB,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def cell(file: str, *words: str, steps: int) -> dict[str, Any]:
    """``measure`` of a script in a process of its own."""
    command = [sys.executable, file, "--cell", *words, "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft")} | {"python": platform.python_version()}


def processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


def table(cells: list[dict[str, Any]]) -> str:
    """The best of each cell's runs as Markdown, with our factor over PEFT."""
    lines = [
        "| dtype | rival | tokens / CPU s | peak growth MiB | kept for backward MiB | loss |",
        "|---|---|---|---|---|---|",
    ]
    for dtype in DTYPES:
        for rival in RIVALS:
            runs = [run for run in cells if (run["rival"], run["dtype"]) == (rival, dtype)]
            best = max(runs, key=lambda run: run["tokens_per_cpu_second"])
            lines.append(
                f"| {dtype} | {rival} | {best['tokens_per_cpu_second']:.0f} | {best['peak_growth_mib']:.0f}"
                f" | {best['kept_for_backward_mib']:.0f} | {best['first_loss']:.3f} to {best['last_loss']:.3f} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per process")
    parser.add_argument("--repeats", type=int, default=2, help="processes per cell; the best counts")
    parser.add_argument("--cell", nargs=2, metavar=("RIVAL", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(measure(*arguments.cell, steps=arguments.steps)))
        return 0
    cells = [
        cell(__file__, rival, dtype, steps=arguments.steps)
        for _ in range(arguments.repeats)
        for dtype in DTYPES
        for rival in RIVALS
    ]
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python benchmarks/experts.py --steps {arguments.steps} --repeats {arguments.repeats}",
        "device": f"{processor()}, 1 thread",
        "shared_machine": True,
        "versions": versions(),
        "sizes": {**SIZES, "rank": RANK, "batch": BATCH, "length": LENGTH},
        "cells": cells,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(cells))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
