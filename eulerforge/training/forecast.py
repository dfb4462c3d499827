"""How fast a run will be, from the seconds that one micro-batch took: tokens per second, and the time of all steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eulerforge.data.batches import Batch, BatchPlan
from eulerforge.training.progress import duration

if TYPE_CHECKING:
    from eulerforge.training.assemble import Run


def forecast(run: Run, batch: Batch, seconds: float) -> dict[str, Any]:
    """``tokens_per_s`` of real tokens; ``steps``, ``tokens`` and ``seconds`` of the whole run, None without rows."""
    speed = batch.tokens / seconds
    if run.datasets is None:
        return {"tokens_per_s": speed, "steps": None, "tokens": None, "seconds": None}
    rows = run.datasets.train
    plan = BatchPlan.of(rows, run.config)
    steps = plan.total_steps(run.config.training)
    tokens = int(steps * plan.rows_per_step * float(rows.lengths.mean()))
    return {"tokens_per_s": speed, "steps": steps, "tokens": tokens, "seconds": tokens / speed}


def forecast_line(found: dict[str, Any]) -> str:
    """The forecast as a person reads it."""
    speed = f"forecast: {found['tokens_per_s']:,.0f} tokens/s"
    if found["steps"] is None:
        return f"{speed}, by made-up rows"
    return (
        f"{speed}; {found['steps']:,} steps of {found['tokens'] // found['steps']:,} tokens take"
        f" {duration(found['seconds'])}, held-out rows left out"
    )
