"""``train --preflight``: everything but the training. Nothing is written.

One forward and backward pass per phase proves that every trainable tensor gets a gradient and that no other does.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from eulerforge.data.batches import Batch, BatchPlan
from eulerforge.errors import RunError
from eulerforge.models.processor import product_key
from eulerforge.models.quantized import parameter_count
from eulerforge.training.assemble import Run
from eulerforge.training.estimate import estimate_lines
from eulerforge.training.estimated import Estimated
from eulerforge.training.forecast import forecast, forecast_line
from eulerforge.training.forward import label_token_loss
from eulerforge.training.largest import largest_micro_batch
from eulerforge.training.optimizer import make_optimizer
from eulerforge.training.phases import Phase, enter_phase

SYNTHETIC_LENGTH = 32
REPEATED_SECONDS = 10.0


def preflight(run: Run) -> dict[str, Any]:
    """Check the run and give back what it would train and need.

    Raises:
        RunError: a trainable tensor gets no gradient, or the loss is not finite.
        ConfigError: a base weight that should train is not fp32.
    """
    make_optimizer(run.model, run.phases.groups, run.config.training)
    batch, source = _probe_batch(run)
    run.model.train()
    probes = [_probe(run, phase, batch) for phase in run.phases.phases]
    seconds = _seconds_again(run, batch, probes[-1]["seconds"])
    run.model.eval()
    parameters = dict(run.model.named_parameters())
    groups = {
        group: {"tensors": len(names), "parameters": sum(parameters[name].numel() for name in names)}
        for group, names in run.phases.groups.items()
    }
    largest = largest_micro_batch(run.config, run.layout, run.datasets.train if run.datasets is not None else None)
    return {
        "model": run.source.name,
        "backbone": run.backbone,
        "strategy": run.config.strategy,
        "device": str(run.device),
        "dtype": str(run.dtype).removeprefix("torch."),
        "parameters": sum(parameter_count(parameter) for parameter in parameters.values()),
        "groups": groups,
        "phases": [{"step": phase.step, "groups": list(phase.groups)} for phase in run.phases.phases],
        "injection": run.report.to_json(),
        "probe": {"batch": source, "loss": probes[0]["loss"], "tensors_with_gradient": len(run.phases.trained_names)},
        "packing": {**run.packing_facts, "largest_micro_batch": largest.tokens},
        "memory": run.estimated.to_json() if isinstance(run.estimated, Estimated) else None,
        "forecast": forecast(run, batch, seconds),
        "warnings": list(run.warnings),
    }


def preflight_lines(result: dict[str, Any], run: Run) -> list[str]:
    """The result as a person reads it."""
    lines = [f"{result['model']}: {result['parameters']:,} parameters, {result['dtype']} on {result['device']}"]
    lines.append(f"backbone {result['backbone']}, strategy {result['strategy']}")
    lines += run.report.lines()
    lines.append("phase groups")
    for group, facts in result["groups"].items():
        lines.append(f"  {group:<20} {facts['tensors']:>5} tensors  {facts['parameters']:>14,} parameters")
    lines += [f"phase {phase}" for phase in run.phases.phases]
    probe = result["probe"]
    lines.append(
        f"one forward and backward on {probe['batch']}: loss {probe['loss']:.4f},"
        f" every one of {probe['tensors_with_gradient']} trainable tensors gets a gradient"
    )
    lines.append(run.isolation.line(run.layout.packing))
    leak = result["packing"]["leak"]
    if leak is not None:
        lines.append(f"  isolation: replacing documents of a packed row moves the others' states by {leak:.1e}")
    if isinstance(run.estimated, Estimated):
        lines += estimate_lines(run.estimated.found, run.estimated.largest_tokens, run.config)
    lines.append(forecast_line(result["forecast"]))
    return lines + [f"warning: {warning}" for warning in result["warnings"]]


def _probe(run: Run, phase: Phase, batch: Batch) -> dict[str, Any]:
    enter_phase(run.model, run.phases, phase)
    names = run.phases.names_of(phase)
    torch.manual_seed(run.config.seed)
    began = time.perf_counter()
    with run.kept.forward(run.model):
        loss_sum, label_tokens = label_token_loss(run.model, batch)
    loss = loss_sum / label_tokens
    if not torch.isfinite(loss):
        key = product_key(run.config.model.load_precision)
        raise RunError(
            f"the loss of the base model is {float(loss.detach())} on the first rows",
            hint=f"try {key}=fp32; if that changes nothing, the model's weights are damaged",
        )
    loss.backward()
    seconds = _since(began, run.device)
    got = {name for name, parameter in run.model.named_parameters() if parameter.grad is not None}
    run.model.zero_grad(set_to_none=True)
    without = [name for name in names if name not in got]
    if without:
        raise RunError(
            f"{len(without)} of {len(names)} trainable tensors get no gradient ({phase}), {without[0]} first",
            hint="the layer is not part of the model's forward pass, or a plugin's module cuts the gradient off",
        )
    return {"loss": float(loss.detach()), "seconds": seconds}


def _since(began: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _seconds_again(run: Run, batch: Batch, first: float) -> float:
    """Of a second pass, without what the libraries do once; a long first pass is not repeated."""
    if first > REPEATED_SECONDS:
        return first
    began = time.perf_counter()
    with run.kept.forward(run.model):
        loss_sum, label_tokens = label_token_loss(run.model, batch)
    (loss_sum / label_tokens).backward()
    run.model.zero_grad(set_to_none=True)
    return _since(began, run.device)


def _probe_batch(run: Run) -> tuple[Batch, str]:
    """The rows of the first micro-batch, or made-up tokens when no data is set."""
    if run.datasets is not None:
        lines = run.layout.cut(run.datasets.train, BatchPlan.of(run.datasets.train, run.config).rows_of(0))[0]
        count = sum(len(line) for line in lines)
        return run.layout.batch(run.datasets.train, lines, run.device), f"{count} rows of the data"
    length = min(SYNTHETIC_LENGTH, run.config.data.max_length)
    generator = torch.Generator().manual_seed(run.config.seed)
    vocabulary = int(run.model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(vocabulary, (2, length), generator=generator).to(run.device)
    batch = Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        label_at=torch.arange(ids.numel(), device=run.device).view_as(ids)[:, :-1].flatten(),
        next_labels=ids[:, 1:].flatten(),
        tokens=ids.numel(),
    )
    return batch, f"2 rows of {length} made-up tokens (no data is set)"
