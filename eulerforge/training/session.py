"""A whole training run: folder, data, model, base measured, loop, tuned model measured, ``final/``, summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from eulerforge.config.atomic import write_json_atomic, write_text_atomic
from eulerforge.data.batches import BatchPlan
from eulerforge.errors import CheckpointError, Problem, Stopped
from eulerforge.models.samples import generate_answers
from eulerforge.training import outdir
from eulerforge.training.assemble import Run, Say, assemble, refuse_many_processes
from eulerforge.training.checkpoint import TrainState, latest_complete, load_checkpoint, read_state, save_checkpoint
from eulerforge.training.debug import trainable_lines
from eulerforge.training.final import save_final
from eulerforge.training.loop import train_loop, validate
from eulerforge.training.memory import out_of_memory_advice
from eulerforge.training.metrics import MetricsLog
from eulerforge.training.optimizer import make_optimizer
from eulerforge.training.progress import make_progress
from eulerforge.training.prompts import sample_prompts
from eulerforge.training.receipt import base_weights, identity, make_receipt
from eulerforge.training.signals import StopRequest
from eulerforge.training.summary import make_summary

if TYPE_CHECKING:
    from eulerforge.plugins import Registry


@attrs.frozen(kw_only=True)
class SessionOptions:
    """How ``train`` was called, apart from the preset; ``resume_command`` is what a stopped run tells the user."""

    resume: bool = False
    overwrite: bool = False
    debug_every: int = 0
    debug_names: bool = False
    resume_command: str = "the same command with --resume"


def run_training(loaded: Any, registry: Registry, out: Path, options: SessionOptions, say: Say) -> dict[str, Any]:
    """Train what a LoadedConfig describes into ``out``; give back the summary.

    Raises:
        Stopped: a signal came; a checkpoint is saved.
        EulerForgeError: the preset, the data, the model, the folder or the run is at fault.
    """
    refuse_many_processes()
    outdir.check_free(out, resume=options.resume, overwrite=options.overwrite)
    with outdir.locked(out):
        if options.resume and outdir.is_finished(out):
            say(f"{out} is finished: nothing is left to train")
            return _finished_summary(out)
        outdir.sweep(out, say)
        with out_of_memory_advice(loaded.run):
            run = assemble(loaded.run, registry, out=out, say=say)
            return _Session(run, loaded, registry, options, say).train()


class _Session:
    """One run with its folder locked."""

    def __init__(self, run: Run, loaded: Any, registry: Registry, options: SessionOptions, say: Say) -> None:
        self.run, self.loaded, self.registry, self.options, self.say = run, loaded, registry, options, say
        self.out, self.training = run.out, run.config.training
        self.state = TrainState()
        self.saved_at = -1
        plan = BatchPlan(run.datasets.train, self.training.batch_size, self.training.grad_accum_steps, run.config.seed)
        self.total_steps = self.training.max_train_steps or plan.steps_for(self.training.num_epochs or 1.0)
        self.optimizer = make_optimizer(run.model, run.phases.groups, self.training)

    def train(self) -> dict[str, Any]:
        self._announce()
        self._open_folder()
        progress = make_progress(self.total_steps, self.training.log_steps)
        ended = self.state.step == self.total_steps
        with MetricsLog(self.out, step=self.state.step, ended=ended) as log, progress:
            if not self.state.before:
                self.state.before = {**validate(self.run, 0, log, progress), "samples": self._answers()}
            with StopRequest() as stop:
                train_loop(
                    self.run,
                    self.optimizer,
                    self.state,
                    total_steps=self.total_steps,
                    log=log,
                    progress=progress,
                    save=self._save,
                    stop_wanted=lambda: stop.number is not None,
                    debug_every=self.options.debug_every,
                )
                log.sync()
                if self.saved_at != self.state.step:
                    self._save()
                self._stop_if(stop)
                after = {**validate(self.run, self.state.step, log, progress), "samples": self._answers()}
                self._stop_if(stop)
        summary = make_summary(self.run, self.state, after)
        write_json_atomic(self.out / outdir.SUMMARY_FILE, summary)
        include_base = self.run.config.checkpoint.include_base
        # final is last: a folder that has it is a finished run
        save_final(
            self.out,
            self.state,
            self.run.model,
            self.run.report,
            self.run.phases.trained_names,
            include_base=include_base,
        )
        return summary

    def _announce(self) -> None:
        for line in self.run.report.lines():
            self.say(line)
        for warning in self.run.warnings:
            self.say(f"warning: {warning}")
        if self.options.debug_names:
            self.say("\n".join(trainable_lines(self.run.model, self.run.phases)))
        rows = self.run.datasets.validation
        if self.run.config.evaluation.samples and (rows is None or not len(rows)):
            self.say("warning: evaluation.samples needs held-out rows, and data.validation holds none out")

    def _open_folder(self) -> None:
        """Write the preset and the receipt, or check that they still hold and load the newest checkpoint."""
        self.say("hashing the base weights")
        weights = base_weights(self.run.source.folder)
        self.state.identity = identity(self.run, weights)
        if self.options.resume and outdir.is_used(self.out):
            self._load_newest()
        elif self.options.overwrite and outdir.is_used(self.out):
            outdir.clear(self.out)
        elif self.options.resume:
            self.say(f"{self.out} holds no run yet: starting at step 0")
        receipt = make_receipt(self.run, self.registry, weights)
        write_json_atomic(self.out / outdir.RECEIPT_FILE, receipt)
        write_text_atomic(self.out / outdir.CONFIG_FILE, self.loaded.to_toml(comments=False))

    def _load_newest(self) -> None:
        newest = latest_complete(self.out, say=self.say)
        if newest is None:
            self.say(f"{self.out} has no complete checkpoint: starting at step 0")
            return
        saved = read_state(newest)
        refuse_changes(saved.identity, self.state.identity)
        if saved.step > self.total_steps:
            raise CheckpointError(
                f"{newest} is at step {saved.step}, and the run would end at step {self.total_steps} now",
                key="training.max_train_steps",
                hint="put it back to go on with --resume, or start anew with --overwrite or another --output-dir",
            )
        self.state = load_checkpoint(newest, self.run.model, self.optimizer, self.run.phases.trained_names)
        self.saved_at = self.state.step
        self.say(f"resumed from {newest} at step {self.state.step}")

    def _save(self) -> Path:
        self.saved_at = self.state.step
        return save_checkpoint(
            self.out,
            self.state,
            self.run.model,
            self.optimizer,
            self.run.report,
            self.run.phases.trained_names,
            keep_last=self.run.config.checkpoint.keep_last,
        )

    def _stop_if(self, stop: StopRequest) -> None:
        if stop.number is not None:
            raise Stopped(
                f"stopped at step {self.state.step} of {self.total_steps}; checkpoint-{self.state.step} is saved",
                signal_number=stop.number,
                hint=f"go on with: {self.options.resume_command}",
            )

    def _answers(self) -> list[dict[str, Any]]:
        """The model's answers to the preset's prompts and to the first held-out rows."""
        config, rows, tokenizer = self.run.config.evaluation, self.run.datasets.validation, self.run.tokenizer
        prompts = sample_prompts(tokenizer, self.run.config.data, texts=config.prompts, rows=rows, count=config.samples)
        if not prompts:
            return []
        ids = [prompt.ids for prompt in prompts]
        answers = generate_answers(self.run.model, tokenizer, ids, max_new_tokens=config.max_new_tokens)
        return [
            {"prompt": prompt.text, "answer": answer.text, "reference": prompt.reference}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


def refuse_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises CheckpointError with every key whose value is not what the checkpoint was trained with."""
    changed = [key for key in dict.fromkeys([*saved, *now]) if saved.get(key) != now.get(key)]
    if changed:
        raise CheckpointError.of(
            [
                Problem(
                    key=key,
                    message=f"was {_short(saved.get(key))} when the run began and is {_short(now.get(key))} now",
                    hint="put it back to go on with --resume, or start anew with --overwrite or another --output-dir",
                )
                for key in changed
            ]
        )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else json.dumps(value)


def _finished_summary(out: Path) -> dict[str, Any]:
    path = out / outdir.SUMMARY_FILE
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"output_dir": str(out)}
    return {**found, "already_finished": True}
