"""How far a step is from the limit: the FLOP that nobody can save, over the products that this machine can do.

FLOP of a token = 4 N_body + 6 N_lora + 4 V h (share of label tokens) + 3.5 (attention, forward): frozen weights need
two products, adapters three, and the head only for labels. The rate is that of a large square product, measured between
the steps of the real command (``ours_run.py --products``), in CPU seconds of one thread: on a shared machine both slow
down together. The rate over this model's own products, weighted by their FLOP, is measured beforehand, to compare.
Every token of a row is counted, as the peers compute them. So the distance to the limit is that of whole rows; as
shipped, what rows begin with alike is computed once and counted in each.

    python benchmarks/floor.py --steps 8
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import side_by_side

ROWS = 1666
"""Rows of a product: the tokens of a mean step of eight mixed rows."""


def attention_widths(config: Any) -> tuple[int, int]:
    """Numbers of all queries and of all keys of one token."""
    from eulerforge.training.attention import heads_of

    queries, keys, width = heads_of(config)
    return queries * width, keys * width


def products(config: Any, rank: int) -> list[tuple[int, int, int]]:
    """(in, out, how many of them in the model) of the linear layers, the adapters' columns included."""
    hidden, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    q, kv = attention_widths(config)
    return [
        (hidden + rank, q, layers), (hidden, kv, layers), (hidden + rank, kv, layers), (q, hidden, layers),
        (hidden + rank, mlp, 2 * layers), (mlp + rank, hidden, layers),
    ]  # fmt: skip


def peaks(config: Any, rank: int, dtype: str) -> dict[str, float]:
    """FLOP per second of one thread, the best of 12 of each product; runs in a process of its own."""
    import torch
    from measure import PRECISIONS, SQUARE, product_seconds

    torch.set_num_threads(1)
    seconds = partial(product_seconds, dtype=PRECISIONS[dtype], tries=12)
    own = [(into * out * count, count * seconds(ROWS, into, out)) for into, out, count in products(config, rank)]
    square = 2 * SQUARE**3 / seconds(SQUARE, SQUARE, SQUARE)
    return {"square": square, "own": 2 * ROWS * sum(n for n, _ in own) / sum(s for _, s in own)}


def flop_per_token(config: Any, rank: int, rows: list[dict[str, list[int]]]) -> float:
    hidden, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    plain = products(config, 0)
    body = sum(into * out * count for into, out, count in plain)
    q, kv = attention_widths(config)
    lora = rank * layers * ((hidden + q) + (hidden + kv) + 3 * (hidden + mlp))
    tokens = sum(len(row["input_ids"]) for row in rows)
    labels = sum(label != -100 for row in rows for label in row["labels"][1:])
    # causal: half of T x T, for scores and for values
    attention = sum(2 * q * len(row["input_ids"]) ** 2 for row in rows) * layers / tokens
    return 4 * body + 6 * lora + 4 * config.vocab_size * hidden * labels / tokens + 3.5 * attention


def main() -> None:
    if sys.argv[1:2] == ["--peaks"]:
        from transformers import AutoConfig

        print(json.dumps(peaks(AutoConfig.from_pretrained(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
        return
    from rows import read_jsonl
    from transformers import AutoConfig

    args = side_by_side.arguments()
    if args.device != "cpu":
        sys.exit("the floor is measured in CPU seconds; on a GPU count the utilisation: side_by_side.py --device cuda")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = side_by_side.base_model(args, folder)
        side_by_side.prepare(args, model, folder)
        config = AutoConfig.from_pretrained(model)
        command = [sys.executable, __file__, "--peaks", str(model), str(args.rank), args.dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = json.loads(done.stdout.splitlines()[-1])
        print(f"GFLOP/s of a 2048 x 2048 x 2048 product {peak['square'] / 1e9:.0f}, of our own {peak['own'] / 1e9:.0f}")
        flop = flop_per_token(config, args.rank, read_jsonl(folder / "rows.jsonl"))
        print(f"{flop / 1e6:.0f} MFLOP per token")
        for kind in (side_by_side.WHOLE, side_by_side.OURS):
            script, flags = side_by_side.RIVALS[kind]
            side_by_side.RIVALS[kind] = (script, [*flags, "--products"])
            say(kind, [side_by_side.run(kind, args, model, folder) for _ in range(args.rounds)], flop)


def say(kind: str, rounds: list[dict[str, Any]], flop: float) -> None:
    """Print how far the steps after each run's first are from the floor."""
    steps = [step for one in rounds for step in one["steps"][1:]]
    each = [step["cpu"] * step["product_rate"] / (step["tokens"] * flop) for step in steps]
    least = [step["tokens"] * flop / step["product_rate"] for step in steps]
    whole = sum(step["cpu"] for step in steps) / sum(least)
    rates = [step["product_rate"] / 1e9 for step in steps]
    speeds = [round(one["tokens_per_s"], 1) for one in rounds]
    pages = sum(step["system"] for step in steps) / sum(step["cpu"] for step in steps)
    print(f"{kind}: tokens per CPU second {speeds}")
    print(f"  products between the steps: {min(rates):.0f} to {max(rates):.0f} GFLOP/s")
    print(f"  within {whole:.2f}x of the floor; the median step {statistics.median(each):.2f}x, of {len(each)}")
    print(
        f"  {pages:.1%} of the CPU seconds are the kernel's, for memory that is new: {whole * (1 - pages):.2f}x without"
    )


if __name__ == "__main__":
    main()
