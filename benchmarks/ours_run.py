"""EulerForge through its own command, with each step's CPU seconds noted on the way."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from measure import PRECISIONS, StepClock, plain_held_out_loss
from peers.peft_loop import arguments
from rows import read_jsonl


def preset(args: argparse.Namespace, folder: Path) -> Path:
    """The preset of the rivals' run."""
    path = folder / "bench.toml"
    path.write_text(
        f"""
model_name = "{args.model}"
device = "{args.device}"
seed = {args.seed}
output_dir = "{folder / "run"}"
[model.load_precision]
compute_dtype = "{args.dtype}"
[injection]
strategy = "dense_lora"
lora_r = {args.rank}
lora_alpha = {2 * args.rank}
lora_dropout = {args.dropout}
target_keywords = ["gate_proj", "up_proj", "down_proj"]
[injection.attn_lora]
enabled = true
keywords = ["q_proj", "v_proj"]
[data]
format = "processed"
path = "{args.rows}"
max_length = {max(len(row["input_ids"]) for row in read_jsonl(args.rows))}
share_prefixes = {str(not args.whole_rows).lower()}
[training]
lr = {args.lr}
weight_decay = 0.0
scheduler = "constant"
max_train_steps = {args.steps}
batch_size = {args.batch_size}
gradient_checkpointing = {str(args.checkpointing).lower()}
[checkpoint]
include_base = false
""",
        encoding="utf-8",
    )
    return path


def main() -> None:
    args = arguments()
    args.rows = args.rows.with_name("rows_unordered.jsonl")  # we shuffle ourselves; the rivals got our order
    from eulerforge.cli.main import main as eulerforge
    from eulerforge.lora.linear import LoRALinear
    from eulerforge.training.metrics import MetricsLog

    if args.two_products:
        LoRALinear._joins = lambda layer, x: False  # type: ignore[method-assign]
    clock = StepClock(args.out, products=PRECISIONS[args.dtype] if args.products else None)
    write = MetricsLog.write

    def noted(log: MetricsLog, row: dict) -> None:
        write(log, row)
        if "grad_norm" in row:
            clock.step(row["step"], row["loss"], row["tokens"])
        else:
            clock.mark()

    MetricsLog.write = noted  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        code = eulerforge(["train", "--preset", str(preset(args, Path(folder)))])
        if code:
            sys.exit(code)
        held_out = None
        if args.held_out:
            from eulerforge.export.rundir import open_run
            from eulerforge.plugins import load_registry

            run = open_run(Path(folder) / "run", registry=load_registry())
            held_out = plain_held_out_loss(run.model, read_jsonl(args.held_out))
        clock.done(held_out=held_out)


if __name__ == "__main__":
    main()
