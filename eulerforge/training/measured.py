"""How the model of a run does while it trains: its held-out loss and its answers, and where they are written.

Notable: the loss of a step belongs into the checkpoint of that step, where ``keep_best`` reads it. A step is measured
before it is saved, except where a stop gave the measuring up and at the end; then the checkpoint is written once more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from eulerforge.models.samples import generate_answers
from eulerforge.training.assemble import Run
from eulerforge.training.evaluate import EvaluationStopped, held_out_loss
from eulerforge.training.manifest import TrainState
from eulerforge.training.metrics import RowLog
from eulerforge.training.progress import Progress
from eulerforge.training.prompts import sample_prompts


def measure(
    run: Run,
    state: TrainState,
    log: RowLog,
    progress: Progress,
    stop_wanted: Callable[[], bool],
    *,
    save_again: Callable[[], Path] | None = None,
) -> dict[str, float]:
    """Held-out loss as it is now, into the metrics, the state and onto the screen; empty without rows or at a stop.

    ``save_again`` is given where the checkpoint of this step is saved already.
    """
    rows = run.datasets.validation
    if rows is None or not len(rows):
        return {}
    try:
        result = held_out_loss(run.model, rows, run.eval_layout, run.device, stop_wanted=stop_wanted)
    except EvaluationStopped:
        return {}
    facts = {"held_out_loss": result.loss, "perplexity": result.perplexity, "held_out_tokens": result.label_tokens}
    log.write({"step": state.step, **facts, "seconds": result.seconds})
    progress.validation(state.step, result)
    found = {"step": state.step, "loss": result.loss}
    if state.held_out != found:
        state.held_out = found
        if save_again is not None:
            log.sync()
            save_again()
    return facts


def answers(run: Run, stop_wanted: Callable[[], bool]) -> list[dict[str, Any]]:
    """The model's answers to the preset's prompts and to the first held-out rows; fewer at a stop."""
    config, rows, tokenizer = run.config.evaluation, run.datasets.validation, run.tokenizer
    prompts = sample_prompts(tokenizer, run.config.data, texts=config.prompts, rows=rows, count=config.samples)
    found = []
    for prompt in prompts:
        if stop_wanted():
            break
        (answer,) = generate_answers(run.model, tokenizer, [prompt.ids], max_new_tokens=config.max_new_tokens)
        found.append({"prompt": prompt.text, "answer": answer.text, "reference": prompt.reference})
    return found
