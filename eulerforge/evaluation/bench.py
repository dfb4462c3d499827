"""How good a trained run is on rows that it has not seen, beside its own base on the same rows.

The adapters are merged first, so that what is measured is the plain dense model that an export holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from eulerforge.config.cachedir import cache_root
from eulerforge.config.schema import DataConfig, ValidationConfig
from eulerforge.data.batches import pad_id
from eulerforge.data.packing import Layout
from eulerforge.data.prepared import build_dataset
from eulerforge.data.tokenized import TokenizedRows
from eulerforge.errors import CheckpointError, UsageError
from eulerforge.export.rundir import OpenBase, attach, locate, open_base
from eulerforge.lora.merge import merge_in_place
from eulerforge.models.device import DTYPE_NAMES
from eulerforge.models.linear_ops import linear_ops_from
from eulerforge.models.processor import QUANTIZED_MODES
from eulerforge.models.quantized import describe
from eulerforge.models.samples import Answer, generate_answers
from eulerforge.training.evaluate import Evaluation, held_out_loss
from eulerforge.training.prompts import Sample, SamplePrompt, sample_prompts

if TYPE_CHECKING:
    from eulerforge.plugins import Registry

Say = Callable[[str], None]


@attrs.frozen(kw_only=True)
class Scores:
    """Mean loss per trained token in nats, its exponential, and real tokens read per second."""

    loss: float
    perplexity: float
    tokens_per_second: float

    @classmethod
    def of(cls, evaluation: Evaluation) -> Scores:
        speed = evaluation.tokens / evaluation.seconds if evaluation.seconds else 0.0
        return cls(loss=evaluation.loss, perplexity=evaluation.perplexity, tokens_per_second=speed)


@attrs.frozen(kw_only=True)
class BenchReport:
    """``mode`` is merged or live; ``gain`` is the part of the base's loss that is gone."""

    run: str
    checkpoint: str
    step: int
    mode: str
    device: str
    dtype: str
    rows: int
    label_tokens: int
    base: Scores
    tuned: Scores
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]

    @property
    def gain(self) -> float:
        return 1 - self.tuned.loss / self.base.loss if self.base.loss else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**attrs.asdict(self), "gain": self.gain}


@attrs.frozen(kw_only=True)
class BenchRequest:
    """What ``bench`` is asked for; ``data`` replaces the run's held-out rows."""

    path: Path
    checkpoint: int | None = None
    live: bool = False
    samples: int | None = None
    prompts: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    device: str | None = None


def run_bench(request: BenchRequest, *, registry: Registry, say: Say) -> BenchReport:
    """Measure the base, load the adapters into it, merge them, and measure again.

    Raises:
        UsageError: the run holds out no rows and none are given.
        EulerForgeError: the run cannot be opened.
    """
    location = locate(request.path, request.checkpoint, say=say)
    for note in location.notes:
        say(f"note: {note}")
    base = open_base(location, registry=registry, device=request.device, say=say)
    rows = held_out_rows(base, request.data)
    settings = base.run.evaluation
    count = settings.samples if request.samples is None else request.samples
    prompts = sample_prompts(
        base.tokenizer, base.run.data, texts=request.prompts or settings.prompts, rows=rows, count=count
    )
    limit = request.max_new_tokens or settings.max_new_tokens

    say(f"measuring the base on {len(rows):,} held-out rows")
    before, base_answers = _measure(base, rows, prompts, limit)
    run = attach(base, registry)
    for warning in run.warnings:
        say(f"warning: {warning}")
    if not request.live:
        merge_in_place(run.model, linear_ops_from(registry))
    notes = location.notes
    if base.run.model.load_precision.mode in QUANTIZED_MODES:
        into = "beside" if request.live else "merged into"
        notes += (f"the adapters are {into} the dequantized {describe(base.run.model.load_precision)} base",)
        say(f"note: {notes[-1]}")
    say(f"measuring {location.checkpoint.name}, {'adapters on' if request.live else 'merged'}")
    after, tuned_answers = _measure(run, rows, prompts, limit)
    return BenchReport(
        run=str(location.folder),
        checkpoint=location.checkpoint.name,
        step=location.state.step,
        mode="live" if request.live else "merged",
        device=str(base.device),
        dtype=DTYPE_NAMES.get(base.dtype, str(base.dtype)),
        rows=len(rows),
        label_tokens=after.label_tokens,
        base=Scores.of(before),
        tuned=Scores.of(after),
        samples=tuple(
            Sample(prompt=prompt.text, base=old.text, tuned=new.text, reference=prompt.reference)
            for prompt, old, new in zip(prompts, base_answers, tuned_answers, strict=True)
        ),
        notes=notes,
    )


def held_out_rows(base: OpenBase, data: tuple[str, ...] = ()) -> TokenizedRows:
    """The rows that the run held out, made as the training made them, or those of other files.

    Raises:
        UsageError: the run held nothing out.
        CheckpointError: the data have changed, and what is held out of them now may have been trained on.
        DataError: a file or a row is wrong.
    """
    config: DataConfig = base.run.data
    if data:
        config = attrs.evolve(config, path=data, validation=ValidationConfig(), max_rows=None)
        return build_dataset(config, base.tokenizer, seed=base.run.seed, cache_dir=cache_root()).train
    rows = build_dataset(config, base.tokenizer, seed=base.run.seed, cache_dir=cache_root()).validation
    if rows is None or not len(rows):
        raise UsageError(
            "the run held no rows out", key="data.validation", hint="give rows that it has not seen with --data FILE"
        )
    if not base.location.held_out(rows.sha256):
        names = ", ".join(config.validation.path or config.path)
        raise CheckpointError(
            f"{names}: the rows have changed since the training: what is held out of them now is not what was",
            key="data.validation",
            hint="put the file back as it was, or give rows that the run has not seen with --data FILE",
        )
    return rows


def _measure(
    opened: OpenBase, rows: TokenizedRows, prompts: Sequence[SamplePrompt], max_new_tokens: int
) -> tuple[Evaluation, list[Answer]]:
    evaluation = held_out_loss(
        opened.model,
        rows,
        Layout.padded(opened.run.eval_batch_size, pad_id(opened.tokenizer)),
        opened.device,
    )
    ids = [prompt.ids for prompt in prompts]
    return evaluation, generate_answers(opened.model, opened.tokenizer, ids, max_new_tokens=max_new_tokens)
