"""A whole training run: folder, data, model, base measured, loop, tuned model measured, ``final/``, summary."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from eulerforge.config.atomic import write_json_atomic, write_text_atomic
from eulerforge.config.phase_checks import warmup_problems
from eulerforge.data.batches import BatchPlan
from eulerforge.errors import Stopped, as_stopped
from eulerforge.training import outdir
from eulerforge.training.assemble import Run, Say, assemble, refuse_many_processes
from eulerforge.training.basehash import BaseHash
from eulerforge.training.blame import plugin_blamed
from eulerforge.training.debug import trainable_lines
from eulerforge.training.final import refuse_no_room, save_final
from eulerforge.training.identity import identity, shown, soft_changes
from eulerforge.training.loop import train_loop
from eulerforge.training.manifest import TrainState
from eulerforge.training.measured import answers, measure
from eulerforge.training.memory import out_of_memory_advice
from eulerforge.training.metrics import MetricsLog
from eulerforge.training.optimizer import make_optimizer
from eulerforge.training.progress import Progress, make_progress
from eulerforge.training.receipt import day_of, make_receipt, read_receipt
from eulerforge.training.saves import Saves
from eulerforge.training.signals import StopRequest
from eulerforge.training.summary import make_summary

if TYPE_CHECKING:
    from eulerforge.models.source import BaseSource
    from eulerforge.plugins import Registry


@attrs.frozen(kw_only=True)
class SessionOptions:
    """How ``train`` was called, apart from the preset.

    ``allow_changed`` names keys that may differ from what the run began with; ``resume_command`` is what a stopped run
    tells the user.
    """

    resume: bool = False
    overwrite: bool = False
    allow_changed: tuple[str, ...] = ()
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
        outdir.sweep(out, say)
        if options.resume and outdir.is_finished_and_whole(out, say, loaded.run.training):
            say(f"{out} is finished: nothing is left to train")
            return _finished_summary(out, say)
        if options.resume:
            outdir.refuse_foreign(out, damaged_may_go=True)
        if options.resume and not outdir.is_used(out):
            say(f"warning: {out} holds no run to resume: a new one starts at step 0 (is that folder the one you mean?)")
        with out_of_memory_advice(loaded.run) as shortage:
            hashing = BaseHash()

            def found(source: BaseSource) -> None:
                outdir.refuse_base(out, source.folder)
                hashing.begin(source.folder)

            began, config = None, loaded.run
            if options.resume:
                began, config = day_of(read_receipt(out)), outdir.with_recorded_revision(config, out)
            run = assemble(config, registry, out=out, began=began, found=found, shortage=shortage, say=say)
            return _Session(run, loaded, registry, options, hashing, say).train()


class _Session:
    """One run with its folder locked."""

    def __init__(
        self, run: Run, loaded: Any, registry: Registry, options: SessionOptions, hashing: BaseHash, say: Say
    ) -> None:
        self.run, self.loaded, self.registry, self.options, self.say = run, loaded, registry, options, say
        self.hashing = hashing
        self.out, self.training = run.out, run.config.training
        self.state = TrainState()
        self.stop = StopRequest()
        self.total_steps = BatchPlan.of(run.datasets.train, run.config).total_steps(self.training)
        self.optimizer = make_optimizer(run.model, run.phases.groups, self.training)
        self.saves = Saves(run, self.optimizer, say)

    def train(self) -> dict[str, Any]:
        self._announce()
        if self.hashing.pending:
            self.say("hashing the base weights")
        weights = self.hashing.result(self.run.source.folder)
        self.say(self.hashing.line())
        try:
            return self._train(weights)
        except KeyboardInterrupt as error:
            hint = f"it goes on from the newest checkpoint: {self.options.resume_command}"
            raise as_stopped(error, f"at once, after step {self.state.step} of {self.total_steps}", hint) from None

    def _train(self, weights: dict[str, Any]) -> dict[str, Any]:
        include_base = self.run.config.checkpoint.include_base
        freed = outdir.own_bytes(self.out) if self.options.overwrite else 0
        names = self.run.phases.trained_names
        refuse_no_room(self.out, self.run.model, names, include_base=include_base, freed=freed)
        with self.stop:
            self._open_folder(weights)
            after = self._trained()
        self.run.isolation.remove()
        self.run.norms.remove()
        self.run.mlps.remove()
        summary = make_summary(self.run, self.state, after)
        write_json_atomic(self.out / outdir.SUMMARY_FILE, summary)
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

    def _trained(self) -> dict[str, Any]:
        """Train to the last step, with a checkpoint there; give back how the tuned model does."""
        progress = make_progress(self.total_steps, self.training.log_steps)
        # measured again: at the end always, elsewhere when a stop gave it up
        again = self.state.step == self.total_steps or self.state.held_out.get("step") != self.state.step
        blamed = plugin_blamed(self.registry, lambda: self.state.step)
        opened = MetricsLog(self.out, step=self.state.step, measured_again=again, say=self.say)
        with opened as log, progress, blamed:
            if not self.state.step:
                self.state.before = self._measured(log, progress)
            train_loop(
                self.run,
                self.optimizer,
                self.state,
                total_steps=self.total_steps,
                log=log,
                progress=progress,
                save=self._save,
                stop_wanted=self.stop.wanted,
                debug_every=self.options.debug_every,
            )
            log.sync()
            if self.saves.saved_at != self.state.step:
                self._save()
            self._stop_if_wanted()
            after = self._measured(log, progress)
            log.sync()
            self._stop_if_wanted()
        return after

    def _announce(self) -> None:
        for line in self.run.report.lines():
            self.say(line)
        for warning in self.run.warnings:
            self.say(f"warning: {warning}")
        if self.training.max_train_steps is None:  # else it was said when the preset was read
            for problem in warmup_problems(self.training, self.total_steps):
                for line in problem.lines("warning"):
                    self.say(line)
        if self.options.debug_names:
            self.say("\n".join(trainable_lines(self.run.model, self.run.phases)))
        rows = self.run.datasets.validation
        if rows is None or not len(rows):
            for key, value in (
                ("training.val_steps", self.training.val_steps),
                ("evaluation.samples", self.run.config.evaluation.samples),
            ):
                if value:
                    self.say(
                        f"warning: {key} does nothing without held-out rows; --set data.validation.size=50 keeps some"
                    )

    def _open_folder(self, weights: dict[str, Any]) -> None:
        """Write the preset and the receipt, or check that they still hold and load the newest checkpoint."""
        resumes = self.options.resume and outdir.is_used(self.out)
        old = read_receipt(self.out) if resumes else {}
        self.state.run_id = str(old.get("run_id") or (resumes and self.saves.newest_run_id()) or secrets.token_hex(8))
        self.state.identity = identity(self.run, self.registry, weights, self.total_steps)
        parts = list(old.get("resumed", []))
        if resumes:
            self.state, changed = self.saves.go_on(self.state, self.total_steps, self.options.allow_changed)
            receipt = make_receipt(self.run, self.registry, weights, self.state.run_id)
            parts.append({"step": self.state.step, "changed": changed, "soft": soft_changes(old, receipt)})
            for fact in parts[-1]["soft"]:
                self.say(
                    f"warning: {fact['key']} was {shown(fact['was'])} and is {shown(fact['now'])} now:"
                    " the run may not go on bit for bit"
                )
        else:
            if self.options.overwrite and outdir.is_used(self.out):
                outdir.clear(self.out)
                for folder in outdir.exports_in(self.out):
                    self.say(
                        f"warning: {folder} stays, and is an export of the run that was overwritten:"
                        " export anew with --overwrite, or delete it"
                    )
            receipt = make_receipt(self.run, self.registry, weights, self.state.run_id)
        # the configuration first: it is what makes the folder a run
        # with the day that its rows were rendered with
        recorded = attrs.evolve(self.loaded, run=outdir.found_from_everywhere(self.run.config, self.run.source))
        write_text_atomic(self.out / outdir.CONFIG_FILE, recorded.to_toml(comments=False))
        write_json_atomic(self.out / outdir.RECEIPT_FILE, {**receipt, "resumed": parts})

    def _save(self) -> Path:
        return self.saves.save(self.state)

    def _stop_if_wanted(self) -> None:
        if self.stop.number is not None:
            raise Stopped(
                f"stopped at step {self.state.step} of {self.total_steps}; checkpoint-{self.state.step} is saved",
                signal_number=self.stop.number,
                hint=f"go on with: {self.options.resume_command}",
            )

    def _measured(self, log: MetricsLog, progress: Progress) -> dict[str, Any]:
        """Held-out loss and answers of the model as it is now; empty when a stop was asked for on the way."""
        again = self._save if self.saves.saved_at == self.state.step else None
        facts = measure(self.run, self.state, log, progress, self.stop.wanted, save_again=again)
        samples = answers(self.run, self.stop.wanted)
        return {} if self.stop.wanted() else {**facts, "samples": samples}


def _finished_summary(out: Path, say: Say) -> dict[str, Any]:
    path = out / outdir.SUMMARY_FILE
    found: dict[str, Any] = {"output_dir": str(out)}
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, RecursionError) as error:
        say(f"warning: {path} cannot be read: {error}")
    return {**found, "already_finished": True}
