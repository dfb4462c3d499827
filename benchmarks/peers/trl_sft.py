"""TRL's SFTTrainer with PEFT: as shipped (activation checkpointing on), without it, and with packing."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from datasets import Dataset
from measure import PRECISIONS, StepClock, plain_held_out_loss
from peft_loop import TARGETS, arguments
from rows import read_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    def __init__(self, clock: StepClock, tokens: list[int]) -> None:
        self.clock, self.tokens, self.step = clock, tokens, 0

    def on_step_begin(self, args, state, control, **kwargs):
        if self.step == 0:
            self.clock.mark()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.clock.step(self.step + 1, float(logs["loss"]), self.tokens[self.step])
            self.step += 1


def main() -> None:
    from peft import LoraConfig

    args = arguments()
    dtype = PRECISIONS[args.dtype]
    rows = read_jsonl(args.rows)
    sizes = [len(row["input_ids"]) for row in rows]
    per_step = [sum(sizes[at : at + args.batch_size]) for at in range(0, len(sizes), args.batch_size)]
    # a packed row is max_length tokens; one such row per step has about the real tokens of a plain step
    length = max(max(sizes), sum(sizes) // args.steps) if args.packing else max(sizes)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=1 if args.packing else args.batch_size,
            max_steps=args.steps,
            learning_rate=args.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_length=length,
            packing=args.packing,
            gradient_checkpointing=args.checkpointing,
            train_sampling_strategy="sequential",
            shuffle_dataset=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=args.dtype == "bf16",
            use_cpu=args.device == "cpu",
            dataloader_num_workers=0,
            seed=args.seed,
            disable_tqdm=True,
        )
        peft = LoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            lora_dropout=args.dropout,
            target_modules=TARGETS,
            task_type="CAUSAL_LM",
        )
        clock = StepClock(args.out)
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=peft,
            callbacks=[Clock(clock, per_step)],
        )
        if args.packing:
            packed = [sum(lengths) for lengths in trainer.train_dataset["seq_lengths"]]
            per_step[:] = (packed * args.steps)[: args.steps]
        trainer.train()
    clock.done(held_out=plain_held_out_loss(trainer.model, read_jsonl(args.held_out)) if args.held_out else None)


if __name__ == "__main__":
    main()
