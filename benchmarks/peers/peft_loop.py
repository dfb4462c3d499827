"""PEFT with a loop written by hand: what a careful engineer writes without a framework."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from measure import IGNORED, PRECISIONS, StepClock, plain_held_out_loss
from rows import read_jsonl

TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def lora_model(args: argparse.Namespace):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = PRECISIONS[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device)
    config = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, lora_dropout=args.dropout, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def collate(rows, device):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for line, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[line, :length] = torch.tensor(row["input_ids"])
        labels[line, :length] = torch.tensor(row["labels"])
        mask[line, :length] = 1
    return ids.to(device), mask.to(device), labels.to(device)


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    model = lora_model(args)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0, fused=True)
    rows = read_jsonl(args.rows)
    clock = StepClock(args.out)
    for step in range(args.steps):
        chosen = rows[step * args.batch_size : (step + 1) * args.batch_size]
        # length-sorted micro-batches with the step's own label count: the same gradient, less padding
        parts = [chosen]
        if args.sorted:
            chosen = sorted(chosen, key=lambda row: len(row["input_ids"]))
            parts = [chosen[at : at + 2] for at in range(0, len(chosen), 2)]
        labelled = sum(label != IGNORED for row in chosen for label in row["labels"][1:])
        total = 0.0
        for part in parts:
            ids, mask, labels = collate(part, args.device)
            with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.dtype == "bf16"):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].reshape(-1, logits.shape[-1]).float(), labels[:, 1:].reshape(-1), reduction="sum"
            )
            (loss / labelled).backward()
            total += loss.item() / labelled
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.step(step + 1, total, sum(len(row["input_ids"]) for row in chosen))
    clock.done(held_out=plain_held_out_loss(model, read_jsonl(args.held_out)) if args.held_out else None)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("model", "rows", "held-out", "out"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sorted", action="store_true")
    parser.add_argument("--products", action="store_true", help="ours only: time a matrix product between the steps")
    parser.add_argument("--two-products", action="store_true", help="ours only: round base and low-rank output apart")
    parser.add_argument(
        "--whole-rows", action="store_true", help="ours only: compute what rows begin with alike in each"
    )
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
