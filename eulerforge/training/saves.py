"""The checkpoints of one run: those that it writes, and the one that it goes on from.

``training/checkpoint.py`` knows a checkpoint's files; here is what a run makes of them: which changes it accepts, and
what it forgets when it goes on with other rows or another base.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eulerforge.errors import CheckpointError
from eulerforge.training import outdir
from eulerforge.training.assemble import Run, Say
from eulerforge.training.checkpoint import fits, load_checkpoint, save_checkpoint
from eulerforge.training.identity import BASE, HELD_OUT, accept_changes, derived_keys, shown
from eulerforge.training.manifest import TrainState, read_state
from eulerforge.training.rotation import delete_rotated, latest_complete


class Saves:
    """``saved_at`` is the step of the checkpoint that was written or loaded last, -1 before there is one."""

    def __init__(self, run: Run, optimizer: torch.optim.Optimizer, say: Say) -> None:
        self.run, self.optimizer, self.say = run, optimizer, say
        self.saved_at = -1

    def save(self, state: TrainState) -> Path:
        """Write the checkpoint of this step; older ones that the preset does not keep go."""
        self.saved_at = state.step
        run = self.run
        names = run.phases.trained_names
        return save_checkpoint(run.out, state, run.model, self.optimizer, run.report, names, **self._kept)

    def go_on(
        self, now: TrainState, total_steps: int, allowed: Sequence[str]
    ) -> tuple[TrainState, list[dict[str, Any]]]:
        """The state of the newest complete checkpoint, and the changes since then that were ``allowed``.

        Its tensors are put into model and optimizer. Without one it is ``now``, which has the identity of the run.

        Raises:
            CheckpointError: something else has changed, or the folder holds checkpoints that cannot be gone on from.
        """
        out, names = self.run.out, self.run.phases.trained_names
        newest = latest_complete(out, say=self.say, run_id=now.run_id)
        if newest is None:
            outdir.refuse_to_begin_anew(out)
            self.say(f"{out} has no complete checkpoint: starting at step 0")
            return now, []
        saved = read_state(newest)
        changed = accept_changes(
            saved.identity,
            now.identity,
            allowed,
            derived=derived_keys(self.run.config),
            fits=partial(fits, newest, self.run.model, names),
        )
        if saved.step > total_steps:
            raise CheckpointError(
                f"{newest} is at step {saved.step}, and the run would end at step {total_steps} now",
                key="training.max_train_steps",
                hint="put it back to go on with --resume, or start anew with --overwrite or another --output-dir",
            )
        state = load_checkpoint(newest, self.run.model, self.optimizer, names)
        state.identity, state.run_id = now.identity, state.run_id or now.run_id
        self.saved_at = state.step
        others = {fact["key"] for fact in changed}
        # losses on other rows are not compared with those to come; the base's answers are, where it is the same base
        if HELD_OUT in others:
            state.before = {"samples": state.before.get("samples", [])}
            state.held_out = {}
        if others & {*BASE}:
            state.before, state.held_out = {}, {}
        # the save may have been the last thing that the run did
        delete_rotated(out, state, **self._kept)
        self.say(f"resumed from {newest} at step {state.step}")
        for fact in changed:
            self.say(f"warning: {fact['key']} was {shown(fact['was'])} and is {shown(fact['now'])} now, as allowed")
        return state, changed

    def newest_run_id(self) -> str:
        """The run's id as its newest complete checkpoint has it, for a folder whose receipt is lost."""
        out = self.run.out
        newest = latest_complete(out)
        if newest is None:
            return ""
        self.say(f"warning: {out / outdir.RECEIPT_FILE} cannot be read: the run is that of {newest.name}")
        return read_state(newest).run_id

    @property
    def _kept(self) -> dict[str, int | None]:
        config = self.run.config.checkpoint
        return {"keep_last": config.keep_last, "keep_best": config.keep_best}
