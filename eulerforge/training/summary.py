"""What a finished run says: was it worth it, what did it cost, where is it, what comes next."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import attrs

from eulerforge.models.sizes import gib
from eulerforge.training.memory import peak_bytes
from eulerforge.training.progress import duration
from eulerforge.training.prompts import Sample

if TYPE_CHECKING:
    from eulerforge.training.assemble import Run
    from eulerforge.training.manifest import TrainState


def make_summary(run: Run, state: TrainState, after: dict[str, Any]) -> dict[str, Any]:
    """The facts; ``held_out`` is None without validation rows, its ``change`` is relative (-0.1 = 10% lower)."""
    held_out = None
    if "held_out_loss" in after:
        before = state.before.get("held_out_loss")
        held_out = {
            "before": before,
            "after": after["held_out_loss"],
            "change": after["held_out_loss"] / before - 1.0 if before else None,
        }
    old = state.before.get("samples", [])
    # a resumed run may ask other prompts than it began with; the same ones keep their places, where one may come twice
    same = [sample["prompt"] for sample in old] == [sample["prompt"] for sample in after["samples"]]
    by_prompt = {sample["prompt"]: sample["answer"] for sample in old}
    samples = [
        attrs.asdict(
            Sample(
                prompt=new["prompt"],
                base=old[place]["answer"] if same else by_prompt.get(new["prompt"]),
                tuned=new["answer"],
                reference=new["reference"],
            )
        )
        for place, new in enumerate(after["samples"])
    ]
    out = str(run.out)
    return {
        "output_dir": out,
        "final": str(run.out / "final"),
        "steps": state.step,
        "tokens": state.tokens,
        "label_tokens": state.label_tokens,
        "seconds": state.seconds,
        "tokens_per_s": state.tokens / state.seconds if state.seconds else None,
        "peak_memory_bytes": peak_bytes(run.device),
        "trained_parameters": _count(run),
        "held_out": held_out,
        "samples": samples,
        "next": [
            f"eulerforge bench {shlex.quote(out)}",
            f"eulerforge merge {shlex.quote(out)}",
        ],
    }


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The same for a person."""
    if "steps" not in summary:
        return [f"{summary['output_dir']} is finished"]
    lines = []
    for sample in summary["samples"]:
        lines += [*Sample(**sample).lines(), ""]
    held_out = summary["held_out"]
    if held_out is not None:
        change = held_out["change"]
        relative = "" if change is None else f" ({abs(change):.1%} {'lower' if change <= 0 else 'HIGHER'})"
        before = "" if held_out["before"] is None else f"{held_out['before']:.4f} -> "
        after = "nan" if held_out["after"] is None else f"{held_out['after']:.4f}"  # null in the file
        lines.append(f"held-out loss {before}{after}{relative}")
    speed = f", {summary['tokens_per_s']:,.0f} tokens/s" if summary["tokens_per_s"] else ""
    lines += [
        f"{summary['steps']:,} steps, {summary['tokens']:,} tokens in {duration(summary['seconds'])}{speed},"
        f" peak memory {gib(summary['peak_memory_bytes'])}",
        f"written to {summary['final']}",
        *(f"next: {command}" for command in summary["next"]),
    ]
    return lines


def _count(run: Run) -> int:
    parameters = dict(run.model.named_parameters())
    return sum(parameters[name].numel() for name in run.phases.trained_names)
