"""Preflight's estimate of the peak memory beside what a run then takes, over models, batches, precisions and layouts.

Each cell is two processes: what ``eulerforge train --preflight`` estimates before it loads the model, and the real
command for three steps, whose largest resident set the kernel tells. One thread, one process at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from shapes import SHAPES, random_model, random_rows

MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 8000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M": ("smollm2-135m", {}),
    "SmolLM2-135M, 8 layers": ("smollm2-135m", {"num_hidden_layers": 8}),
    "Llama, 2 layers, 152k words": ("smollm2-135m", {"num_hidden_layers": 2, "vocab_size": 151936}),
    "Qwen3-0.6B, 6 layers, 32k words": ("qwen3-0.6b", {"num_hidden_layers": 6, "vocab_size": 32000}),
    "Mixtral, 4 small layers": ("mixtral-tiny", {}),
}
S, S8, L, Q, M = MODELS
# model, tokens of a micro-batch, precision (and that of a quantized base's products), dropout, checkpointing, packing,
# rows of 512 tokens or mixed ones
CELLS = [
    (S, 1024, "bf16", 0.05, "off", "flat", "full"),
    (S8, 4096, "bf16", 0.05, "off", "flat", "mixed"),
    (S8, 16384, "bf16", 0.0, "all", "flat", "full"),
    (S8, 4096, "fp32", 0.05, "off", "off", "full"),
    (S, 4096, "bf16", 0.05, "all", "bins", "mixed"),
    (L, 16384, "bf16", 0.05, "off", "flat", "full"),
    (L, 4096, "fp32", 0.0, "all", "off", "full"),
    (L, 1024, "bf16", 0.0, "off", "bins", "mixed"),
    (Q, 4096, "bf16", 0.0, "off", "bins", "mixed"),
    (Q, 1024, "fp32", 0.05, "all", "flat", "full"),
    (M, 4096, "bf16", 0.05, "off", "flat", "mixed"),
    (M, 16384, "fp32", 0.0, "all", "off", "full"),
    (S8, 8192, "bf16", 0.05, "all", "flat", "mixed"),
    (S8, 4096, "fp32", 0.05, "all", "flat", "full"),
    (Q, 4096, "bf16", 0.0, "all", "bins", "mixed"),
    (L, 8192, "bf16", 0.0, "all", "flat", "full"),
    (S, 1024, "int8", 0.05, "off", "flat", "full"),
    (S, 1024, "int4", 0.05, "off", "flat", "full"),
    (Q, 4096, "int8", 0.0, "all", "bins", "mixed"),
    (Q, 4096, "int4", 0.0, "all", "bins", "mixed"),
    (S, 1024, "int8/fp32", 0.05, "off", "flat", "full"),
    (S, 1024, "int4/fp32", 0.05, "off", "flat", "full"),
    (S, 1024, "fp32", 0.05, "off", "flat", "full"),
    (S, 2048, "fp32", 0.05, "off", "flat", "full"),
    (S, 4096, "bf16", 0.05, "off", "flat", "mixed"),
    (S, 8192, "bf16", 0.0, "all", "flat", "mixed"),
    (S8, 2048, "fp32", 0.0, "off", "bins", "mixed"),
    (Q, 2048, "bf16", 0.05, "all", "flat", "mixed"),
    (Q, 4096, "fp32", 0.0, "off", "flat", "full"),
    (M, 8192, "bf16", 0.0, "all", "flat", "full"),
]
ESTIMATE = """
import json, sys
from pathlib import Path
from eulerforge.cli.main import command_parser
from eulerforge.cli.plugin_options import registry_from
from eulerforge.cli.train_config import load_from_args
from eulerforge.training import assemble, session
from eulerforge.training.bigblocks import align_big_blocks

args = command_parser("train").parse_args(sys.argv[2:])
registry = registry_from(args)
def stop(*_, **__):
    raise KeyboardInterrupt
assemble.load_model = stop  # the estimate is made before the model is loaded, and that is not wanted here
made = assemble.from_config
def noted(*arguments):
    found = made(*arguments)
    print(json.dumps(found.found.to_json()), flush=True)
    return found
assemble.from_config = noted
try:
    config = load_from_args(args, registry).run
    align_big_blocks(config)
    assemble.assemble(config, registry, out=Path(config.output_dir), estimates=True)
except KeyboardInterrupt:
    pass
"""
RUN = (
    "import sys\n"
    "from eulerforge.cli.main import main\n"
    "code = main(sys.argv[1:])\n"
    "import torch\n"
    "from eulerforge.training.memory import peak_bytes\n"
    "print(peak_bytes(torch.device('cpu')))\n"
    "sys.exit(code)\n"
)


def words(cell: tuple[Any, ...], folder: Path) -> list[str]:
    """The arguments of ``eulerforge train`` for a cell; its model and rows are made in ``folder``."""
    model, tokens, precision, dropout, checkpointing, packing, rows = cell
    shape, changes = MODELS[model]
    base = folder / f"model {list(MODELS).index(model)}"
    vocabulary = {**SHAPES[shape], **changes}["vocab_size"]
    if not base.exists():
        random_model(shape, base, **changes)
    length = 512 if rows == "full" else 1024
    data = folder / f"{rows} {vocabulary}.jsonl"
    if not data.exists():
        made = random_rows(vocabulary, 256, 0, length if rows == "full" else None)
        # as long as a row may be: a longer one would be cut, which the run refuses
        made = [{key: ids[: length - 1] for key, ids in row.items()} for row in made] if rows == "mixed" else made
        data.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    keys = {
        "model_name": str(base),
        "device": "cpu",
        "output_dir": str(folder / "run"),
        "model.load_precision.mode": precision.partition("/")[0],
        "model.load_precision.compute_dtype": precision.partition("/")[2] or "auto",
        "injection.lora_r": 16,
        "injection.lora_alpha": 32,
        "injection.lora_dropout": dropout,
        "injection.attn_lora.enabled": True,
        "data.path": str(data),
        "data.format": "processed",
        "data.max_length": length,
        "data.max_cut_answers": 1,
        "data.packing": packing,
        "training.batch_size": tokens // length,
        # so many short rows that a micro-batch is filled
        "training.grad_accum_steps": 1 if rows == "full" else 4,
        "training.max_train_steps": 3,
        "training.gradient_checkpointing": checkpointing,
        "training.threads": 1,
        "checkpoint.include_base": False,
    }
    if packing == "flat":
        keys["training.tokens_per_micro_batch"] = tokens
    return ["train"] + [word for key, value in keys.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def run(code: str, arguments: list[str]) -> str:
    """What a fresh process prints on its last line."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr[-3000:]}")
    return done.stdout.strip().splitlines()[-1]


def estimated(arguments: list[str]) -> dict[str, Any]:
    """The estimate of ``--preflight``, bytes by part: from config.json and the rows, before the model is loaded."""
    found: dict[str, Any] = json.loads(run(ESTIMATE, arguments))
    return found


def main() -> None:
    """Measure the cells, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "estimate_grid.json")
    parser.add_argument("--cells", type=int, nargs="*", help="numbers of cells from 1 on; default: all")
    parser.add_argument("--keep-measured", action="store_true", help="estimate anew, keep what --out holds as measured")
    args = parser.parse_args()
    SHAPES["mixtral-tiny"] = MIXTRAL
    old = json.loads(args.out.read_text(encoding="utf-8"))["cells"] if args.out.exists() else []
    known = {tuple(row["cell"]): row for row in old}
    with tempfile.TemporaryDirectory() as name:
        for number, cell in enumerate(CELLS, 1):
            if args.cells and number not in args.cells:
                continue
            arguments = words(cell, Path(name))
            row = {"cell": list(cell)}
            row["estimated"] = estimated(arguments)
            before = known.get(cell, {}).get("measured") if args.keep_measured else None
            row["measured"] = before or int(run(RUN, [*arguments, "--overwrite"]))
            known[cell] = row
            print(line(number, row), flush=True)
            write(args.out, [known[cell] for cell in CELLS if cell in known])


def line(number: int, row: dict[str, Any]) -> str:
    """A row of the table in docs and README."""
    model, tokens, precision, dropout, checkpointing, packing, rows = row["cell"]
    guess, measured = row["estimated"]["peak"], row["measured"]
    return (
        f"| {number} | {model} | {tokens:,} | {precision} | {dropout} | {checkpointing} | {packing}, {rows} |"
        f" {guess / 2**20:,.0f} | {measured / 2**20:,.0f} | {guess / measured:.3f} |"
    )


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """The figures with what they were measured on."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    facts = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.libc_ver()[0]} {platform.libc_ver()[1]}",
        "python": platform.python_version(),
        **versions,
        "command": "python benchmarks/estimate_grid.py",
        "cells": rows,
    }
    out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
