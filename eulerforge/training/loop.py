"""The training loop, to be read from top to bottom.

Notable: one optimizer step trains ``batch_size * grad_accum_steps`` rows, which ``data/packing.py`` cuts into
micro-batches, and its loss is the sum over label tokens divided by all label tokens of the step. They are counted
before the first backward pass, so the gradient does not depend on how the step is cut. Data order, learning rate and
dropout are functions of the seed and the step alone: a run that goes on from a checkpoint computes what an
uninterrupted one would.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eulerforge.data.batches import BatchPlan
from eulerforge.data.packing import Lines
from eulerforge.errors import RunError
from eulerforge.models.processor import product_key
from eulerforge.training.assemble import Run
from eulerforge.training.debug import GroupNorms
from eulerforge.training.forward import label_token_loss
from eulerforge.training.manifest import TrainState
from eulerforge.training.measured import measure
from eulerforge.training.memory import peak_bytes
from eulerforge.training.metrics import RowLog
from eulerforge.training.optimizer import learning_rate
from eulerforge.training.phases import enter_phase
from eulerforge.training.progress import Progress


def train_loop(
    run: Run,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    *,
    total_steps: int,
    log: RowLog,
    progress: Progress,
    save: Callable[[], Path],
    stop_wanted: Callable[[], bool] = lambda: False,
    debug_every: int = 0,
) -> None:
    """Train from ``state.step`` to ``total_steps``, or to the edge of the step in which a stop was asked for.

    ``state`` is advanced in place; ``save`` writes a checkpoint of it.

    Raises:
        RunError: the loss or the gradient is not finite; nothing was updated with it. With
            ``training.on_nonfinite = skip``, only when ``max_skipped_steps`` steps were left out already.
    """
    config, model = run.config.training, run.model
    rows = run.datasets.train
    plan = BatchPlan.of(rows, run.config)
    phase = run.phases.at(state.step)
    trainable = enter_phase(model, run.phases, phase)
    model.train()
    if _validation_is_due(config.val_steps, state, total_steps) and state.held_out.get("step") != state.step:
        measure(run, state, log, progress, stop_wanted, save_again=save)  # a stop gave up this one

    while state.step < total_steps and not stop_wanted():
        step, began = state.step, time.perf_counter()

        if run.phases.at(step) != phase:
            phase = run.phases.at(step)
            trainable = enter_phase(model, run.phases, phase)
            progress.say(f"step {step}: now training {', '.join(phase.groups)}")

        rate = learning_rate(step, total_steps, config)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # forward and backward, micro-batch by micro-batch
        step_rows = plan.rows_of(step)
        micro_batches = run.layout.cut(rows, step_rows)
        batches = [run.layout.batch(rows, lines, run.device) for lines in micro_batches]
        label_tokens = sum(batch.label_tokens for batch in batches)
        grad_norm, fault, suspects = None, "", []
        loss_sums = []
        for micro, batch in enumerate(batches):
            torch.manual_seed(micro_batch_seed(run.config.seed, step, micro))
            with run.forward(micro_batches[micro]):
                loss_sum, _ = label_token_loss(model, batch)
            (loss_sum / label_tokens).backward()
            loss_sums.append(loss_sum.detach())
            # its graph's nodes, small as they are, would lie between the free blocks that the next pass wants
            del loss_sum
        # read once, so that a GPU's next micro-batch is queued while it computes one
        values = torch.stack(loss_sums).tolist()
        loss = 0.0
        for micro, value in enumerate(values):
            loss += value / label_tokens
            if not math.isfinite(value):
                fault, suspects = f"the loss of step {step + 1} is {value}", micro_batches[micro]
                break

        # the update
        norms = None
        if not fault:
            gradients = [parameter.grad for parameter in trainable if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            grad_norm = float(norm)
            del gradients  # they would live beside the next step's
            if not math.isfinite(grad_norm):
                fault = f"the gradient of step {step + 1} is {grad_norm}"
                suspects = [step_rows]
        if not fault:
            if config.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(trainable, config.max_grad_norm, norm)
            watched = debug_every and (step + 1) % debug_every == 0
            norms = GroupNorms(model, run.phases, phase.groups) if watched else None
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if fault:
            _refuse_non_finite(f"{fault}; the rows are {_named(suspects, run)}", state, run)

        # the books
        seconds = time.perf_counter() - began
        tokens = sum(batch.tokens for batch in batches)
        state.step += 1
        state.tokens += tokens
        state.label_tokens += label_tokens
        state.seconds += seconds
        row: dict[str, Any] = {
            "step": state.step,
            "loss": None if fault else loss,
            "lr": rate,
            "grad_norm": None if fault else grad_norm,
            "tokens": tokens,
            "label_tokens": label_tokens,
            "tokens_per_s": tokens / seconds,
            "seconds": seconds,
            "peak_memory_bytes": peak_bytes(run.device),
            "epoch": plan.epoch_at(state.step),
            "phase": list(phase.groups),
        }
        if fault:
            state.skipped += 1
            sources = [rows.source(index) for line in suspects for index in line]
            row |= {"skipped": fault, "rows": sources, "skips": state.skipped}
            progress.say(f"warning: step {state.step} was left out: {fault}; the rows are {_named(suspects, run)}")
        else:
            progress.step(row)
        log.write(row)
        if norms is not None:
            progress.say("\n".join([f"step {state.step} norms", *norms.lines()]))

        if _validation_is_due(config.val_steps, state, total_steps):
            measure(run, state, log, progress, stop_wanted)
        if config.save_steps and state.step % config.save_steps == 0:
            log.sync()
            save()


def micro_batch_seed(seed: int, step: int, micro: int) -> int:
    """A 63-bit seed for the dropout of one micro-batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{micro}".encode()).digest()[:8], "big") >> 1


def _validation_is_due(every: int, state: TrainState, total_steps: int) -> bool:
    return bool(every) and state.step % every == 0 and 0 < state.step < total_steps


def _refuse_non_finite(what: str, state: TrainState, run: Run) -> None:
    """Raises RunError unless the preset leaves such steps out and has not left out too many."""
    config = run.config.training
    wider = f", or {product_key(run.config.model.load_precision)}=fp32" if run.dtype != torch.float32 else ""
    hint = (
        f"the step was not applied; a smaller training.lr, a longer warm-up{wider}"
        " usually mends it, and --resume goes on from the last checkpoint"
    )
    if config.on_nonfinite == "skip":
        if state.skipped < config.max_skipped_steps:
            return
        what += f"; {state.skipped} steps were left out before it, and training.max_skipped_steps allows no more"
    raise RunError(what, hint=hint)


def _named(lines: Lines, run: Run) -> str:
    indices = [index for line in lines for index in line]
    shown = ", ".join(run.datasets.train.source(index) for index in indices[:8])
    return shown + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
