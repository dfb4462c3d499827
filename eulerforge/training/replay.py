"""Train some steps of a run again, in memory, and hold every number against what the run recorded.

Notable: nothing is written, and nothing is sampled. The steps start from a checkpoint (or from step 0, which the seed
gives), go through the same loop as the training, and must give the same losses, and the same tensors wherever the run
left a checkpoint. On the CPU they do, to the bit; on CUDA with ``training.deterministic = true``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from safetensors.torch import load_file

from eulerforge.config import load_run_config
from eulerforge.data.batches import BatchPlan
from eulerforge.errors import CheckpointError, RunError, UsageError
from eulerforge.terminal import strict
from eulerforge.training import outdir
from eulerforge.training.assemble import Run, Say, assemble
from eulerforge.training.checkpoint import ADAPTER_FILE, OPTIMIZER_FILE, load_checkpoint, trained_tensors
from eulerforge.training.identity import accept_changes, identity
from eulerforge.training.loop import train_loop
from eulerforge.training.manifest import TrainState, read_state, verify
from eulerforge.training.memory import out_of_memory_advice
from eulerforge.training.metrics import read_metrics
from eulerforge.training.optimizer import make_optimizer, optimizer_tensors
from eulerforge.training.progress import Progress
from eulerforge.training.receipt import base_weights, read_receipt
from eulerforge.training.rotation import complete_checkpoints

if TYPE_CHECKING:
    from eulerforge.plugins import Registry

COMPARED = ("loss", "grad_norm", "lr", "tokens", "label_tokens", "held_out_loss")


@attrs.frozen(kw_only=True)
class ReplayReport:
    """Steps ``start + 1`` to ``end`` were the same: ``numbers`` values of metrics.jsonl, and tensors at ``folders``."""

    start: int
    end: int
    numbers: int
    tensors: int
    folders: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return attrs.asdict(self)


def replay(out: Path, registry: Registry, *, steps: int, start: int | None, say: Say) -> ReplayReport:
    """Train ``steps`` steps of the run in ``out`` again, from the checkpoint at ``start``.

    ``start`` None is the newest checkpoint with that many recorded steps after it, or step 0.

    Raises:
        RunError: a number or a tensor differs; the message names the first.
        UsageError: there is no such window, or something changed in it, as was allowed.
        CheckpointError: there is nothing to compare with, or the data, the base or a plugin is not what it was.
    """
    if not outdir.is_used(out):
        raise CheckpointError(f"{out} is no run: it has no {outdir.CONFIG_FILE}", hint="give a run's folder")
    recorded = read_metrics(out, say=say)
    folders = _compared_folders(out, say)
    start, end = _window(out, recorded, folders, steps, start)
    loaded = load_run_config(str(out / outdir.CONFIG_FILE), [], strategy_configs=registry.strategy_config)
    with out_of_memory_advice(loaded.run):
        run = assemble(loaded.run, registry, out=out, say=say)
        return _Replay(run, registry, recorded, folders, say).go(start, end)


class _Replay:
    """What the loop takes for its log: each row that it writes is compared with the run's own."""

    def __init__(
        self, run: Run, registry: Registry, recorded: list[dict[str, Any]], folders: dict[int, list[Path]], say: Say
    ) -> None:
        self.run, self.registry, self.folders, self.say = run, registry, folders, say
        self.losses = {row["step"]: strict(row) for row in recorded if "loss" in row}
        self.held_out = {row["step"]: strict(row) for row in recorded if "held_out_loss" in row}
        self.optimizer = make_optimizer(run.model, run.phases.groups, run.config.training)
        self.state = TrainState()
        self.numbers = self.tensors = 0
        self.seen: list[str] = []

    def go(self, start: int, end: int) -> ReplayReport:
        config = self.run.config
        total = BatchPlan.of(self.run.datasets.train, config).total_steps(config.training)
        self._refuse_another_run(total)
        if start:
            self.state = load_checkpoint(
                self.folders[start][0], self.run.model, self.optimizer, self.run.phases.trained_names
            )
        self.say(f"replaying steps {start + 1} to {end} of {total}")
        train_loop(
            self.run,
            self.optimizer,
            self.state,
            total_steps=total,
            log=self,
            progress=_Silent(total, 1),
            save=lambda: self.run.out,
            stop_wanted=lambda: self.state.step >= end,
        )
        return ReplayReport(start=start, end=end, numbers=self.numbers, tensors=self.tensors, folders=tuple(self.seen))

    def write(self, row: dict[str, Any]) -> None:
        """Compare a row of the loop with the recorded one, and the tensors where the run left some."""
        row = strict(row)  # as the log has it
        step = row["step"]
        theirs = (self.losses if "loss" in row else self.held_out).get(step)
        if theirs is None and "loss" in row:
            raise CheckpointError(
                f"{self.run.out}: metrics.jsonl has no row for step {step}",
                hint="the log was cut: --steps must end before it",
            )
        for key in COMPARED:
            if theirs is None or key not in row or key not in theirs:
                continue
            if row[key] != theirs[key]:
                raise self._difference(f"{key} of step {step} was {theirs[key]!r} and is {row[key]!r} now")
            self.numbers += 1
        if "loss" in row:
            for folder in self.folders.get(step, ()):
                self._compare_tensors(folder, step)

    def sync(self) -> None:
        """Nothing is on a disk."""

    def _compare_tensors(self, folder: Path, step: int) -> None:
        now = {
            ADAPTER_FILE: trained_tensors(self.run.model, self.run.phases.trained_names),
            OPTIMIZER_FILE: optimizer_tensors(self.optimizer, self.run.model),
        }
        for name, tensors in now.items():
            if not (folder / name).is_file():
                continue  # final holds no optimizer
            theirs = load_file(folder / name)
            for tensor in sorted(theirs.keys() | tensors.keys()):
                was, found = theirs.get(tensor), tensors.get(tensor)
                if was is None or found is None or not torch.equal(was, found):
                    largest = "" if was is None or found is None else f", by {float((was - found).abs().max()):.3e}"
                    raise self._difference(f"{tensor} after step {step} is not that of {folder.name}/{name}{largest}")
            self.tensors += len(theirs)
        self.seen.append(folder.name)

    def _difference(self, what: str) -> RunError:
        hint = "the same versions, machine type and number of threads give the same bits; receipt.json names the run's"
        if self.run.device.type == "cuda" and not self.run.config.training.deterministic:
            hint = "CUDA repeats itself only with training.deterministic = true, from the run's first step on"
        return RunError(f"the replay differs from {self.run.out}: {what}", hint=hint)

    def _refuse_another_run(self, total: int) -> None:
        """Changed data, base or plugins would be a difference that says nothing of the training."""
        saved = read_state(next(iter(self.folders.values()))[0]).identity
        now = identity(self.run, self.registry, base_weights(self.run.source.folder), total)
        accept_changes(saved, now, (), hint="put it back as it was: a replay trains the same again")


class _Silent(Progress):
    def say(self, text: str) -> None:
        """The report is what counts."""


def _compared_folders(out: Path, say: Say) -> dict[int, list[Path]]:
    """The complete checkpoints of a run by step, ``final`` after the checkpoint of its step."""
    run_id = str(read_receipt(out).get("run_id") or "")
    found: dict[int, list[Path]] = {}
    for folder in _with_final(out, complete_checkpoints(out, say=say, run_id=run_id)):
        found.setdefault(read_state(folder).step, []).append(folder)
    if not found:
        raise CheckpointError(
            f"{out} has no complete checkpoint to hold a replay against", hint="train it first: a replay needs one"
        )
    return found


def _with_final(out: Path, checkpoints: Iterator[Path]) -> Iterator[Path]:
    yield from checkpoints
    if outdir.is_finished(out):
        verify(out / outdir.FINAL)
        yield out / outdir.FINAL


def _window(
    out: Path, recorded: list[dict[str, Any]], folders: dict[int, list[Path]], steps: int, start: int | None
) -> tuple[int, int]:
    """First and last finished step of the replay."""
    last = max((row["step"] for row in recorded if "loss" in row), default=0)
    # final alone holds no optimizer to go on with
    starts = [0, *sorted(step for step, found in folders.items() if (found[0] / OPTIMIZER_FILE).is_file())]
    if start is None:
        start = max((step for step in starts if step + steps <= last), default=0)
    if start not in starts:
        raise UsageError(
            f"{out} has no complete checkpoint of step {start}",
            key="--from",
            hint=f"there are {', '.join(map(str, starts))} (0 is the start)",
        )
    if start + steps > last:
        raise UsageError(
            f"{steps} steps from step {start} on are more than the {last} that {out} recorded",
            key="--steps",
            hint=f"--steps {last - start}" if last > start else f"--from {starts[0]} --steps {last}",
        )
    changed, keys = _last_change(out)
    if start < changed:
        good = [step for step in starts if changed <= step < last]
        raise UsageError(
            f"{', '.join(keys)} changed at step {changed} of {out}, as was allowed: before it were other values",
            key="--from",
            hint=f"--from {good[0]} --steps {min(steps, last - good[0])}"
            if good
            else "no checkpoint from the change on is there to start from",
        )
    return start, start + steps


def _last_change(out: Path) -> tuple[int, list[str]]:
    """The newest step at which a part of the run began with other facts, and their keys; step 0 when none did."""
    changes: list[tuple[int, list[str]]] = [(0, [])]
    for part in read_receipt(out).get("resumed", ()):
        # a part that began before a change has undone it
        changes = [changes[0], *(change for change in changes[1:] if change[0] < part["step"])]
        if part.get("changed"):
            changes.append((part["step"], [fact["key"] for fact in part["changed"]]))
    return changes[-1]
