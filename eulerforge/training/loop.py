"""The training loop, to be read from top to bottom.

Notable: one optimizer step is ``grad_accum_steps`` micro-batches, and its loss is the sum over label tokens divided by
all label tokens of the step. They are counted before the first backward pass, so the gradient does not depend on how
the batch is cut. Data order, learning rate and dropout are functions of the seed and the step alone: a run that goes on
from a checkpoint computes what an uninterrupted one would.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from eulerforge.data.batches import BatchPlan, collate
from eulerforge.errors import RunError
from eulerforge.training.assemble import Run
from eulerforge.training.checkpoint import TrainState
from eulerforge.training.debug import GroupNorms
from eulerforge.training.evaluate import held_out_loss
from eulerforge.training.loss import label_token_loss
from eulerforge.training.memory import peak_bytes
from eulerforge.training.metrics import MetricsLog
from eulerforge.training.optimizer import learning_rate
from eulerforge.training.phases import enter_phase
from eulerforge.training.progress import Progress


def train_loop(
    run: Run,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    *,
    total_steps: int,
    log: MetricsLog,
    progress: Progress,
    save: Callable[[], Path],
    stop_wanted: Callable[[], bool] = lambda: False,
    debug_every: int = 0,
) -> None:
    """Train from ``state.step`` to ``total_steps``, or to the edge of the step in which a stop was asked for.

    ``state`` is advanced in place; ``save`` writes a checkpoint of it.

    Raises:
        RunError: the loss or the gradient is not finite; nothing was updated with it.
    """
    config, model = run.config.training, run.model
    rows = run.datasets.train
    plan = BatchPlan(rows, config.batch_size, config.grad_accum_steps, run.config.seed)
    phase = run.phases.at(state.step)
    trainable = enter_phase(model, run.phases, phase)
    model.train()

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
        micro_batches = plan.step_rows(step)
        batches = [collate(rows, indices, run.pad_id, run.device) for indices in micro_batches]
        label_tokens = sum(batch.label_tokens for batch in batches)
        loss = 0.0
        for micro, batch in enumerate(batches):
            torch.manual_seed(micro_batch_seed(run.config.seed, step, micro))
            loss_sum, _ = label_token_loss(model, batch)
            _refuse_non_finite("loss", float(loss_sum.detach()), step, run, micro_batches[micro])
            (loss_sum / label_tokens).backward()
            loss += float(loss_sum.detach()) / label_tokens

        # the update
        gradients = [parameter.grad for parameter in trainable if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        grad_norm = float(norm)
        _refuse_non_finite("gradient", grad_norm, step, run, [row for part in micro_batches for row in part])
        if config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(trainable, config.max_grad_norm, norm)
        watched = debug_every and (step + 1) % debug_every == 0
        norms = GroupNorms(model, run.phases, phase.groups) if watched else None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # the books
        seconds = time.perf_counter() - began
        tokens = sum(batch.tokens for batch in batches)
        state.step += 1
        state.tokens += tokens
        state.label_tokens += label_tokens
        state.seconds += seconds
        row = {
            "step": state.step,
            "loss": loss,
            "lr": rate,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "label_tokens": label_tokens,
            "tokens_per_s": tokens / seconds,
            "seconds": seconds,
            "peak_memory_bytes": peak_bytes(run.device),
            "epoch": plan.epoch_at(state.step),
            "phase": list(phase.groups),
        }
        log.write(row)
        progress.step(row)
        if norms is not None:
            progress.say("\n".join([f"step {state.step} norms", *norms.lines()]))

        if config.val_steps and state.step % config.val_steps == 0 and state.step < total_steps:
            validate(run, state.step, log, progress)
        if config.save_steps and state.step % config.save_steps == 0:
            log.sync()
            save()


def validate(run: Run, step: int, log: MetricsLog, progress: Progress) -> dict[str, float]:
    """Held-out loss as it is now, into the metrics and onto the screen; empty without validation rows."""
    rows = run.datasets.validation
    if rows is None or not len(rows):
        return {}
    result = held_out_loss(run.model, rows, run.eval_batch_size, run.pad_id, run.device)
    facts = {"held_out_loss": result.loss, "perplexity": result.perplexity, "held_out_tokens": result.label_tokens}
    log.write({"step": step, **facts, "seconds": result.seconds})
    progress.validation(step, result)
    return facts


def micro_batch_seed(seed: int, step: int, micro: int) -> int:
    """A 63-bit seed for the dropout of one micro-batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{micro}".encode()).digest()[:8], "big") >> 1


def _refuse_non_finite(what: str, value: float, step: int, run: Run, indices: list[int]) -> None:
    if math.isfinite(value):
        return
    shown = ", ".join(run.datasets.train.source(index) for index in indices[:8])
    more = f" and {len(indices) - 8} more" if len(indices) > 8 else ""
    raise RunError(
        f"the {what} of step {step + 1} is {value}; the rows are {shown}{more}",
        hint="the step was not applied; a smaller training.lr, a longer warm-up, or model.load_precision.mode=fp32 "
        "usually mends it, and --resume goes on from the last checkpoint",
    )
