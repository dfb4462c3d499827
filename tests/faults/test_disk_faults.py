"""Disks that are full, broken or slow to take bytes: one line, nothing earlier touched, and on it goes afterwards."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import disk as faults
import pytest
import tinyrun
import torch

from eulerforge.cli.main import main
from eulerforge.errors import RunError
from eulerforge.training.checkpoint import save_checkpoint
from eulerforge.training.manifest import TrainState, verify
from eulerforge.training.optimizer import make_optimizer
from eulerforge.training.rotation import latest_complete


class Saved:
    """An assembled run that saves itself on demand, onto a disk that a plan breaks."""

    def __init__(self, prepared: Path, out: Path) -> None:
        self.run = tinyrun.assembled(prepared, output_dir=str(out))
        self.out = out
        self.optimizer = make_optimizer(self.run.model, self.run.phases.groups, self.run.config.training)

    def save(self, step: int, plan: faults.Plan = lambda number, name, path: None) -> faults.Disk:
        with torch.no_grad():
            for parameter in self.run.model.parameters():
                parameter.add_(0.01)
        watched = faults.Disk(self.out, plan)
        with watched.watched():
            save_checkpoint(
                self.out,
                TrainState(step=step),
                self.run.model,
                self.optimizer,
                self.run.report,
                self.run.phases.trained_names,
                keep_last=2,
            )
        return watched


@pytest.fixture
def saved(prepared: Path, tmp_path: Path) -> Saved:
    found = Saved(prepared, tmp_path / "run")
    found.save(1)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_save_that_fails_anywhere_leaves_the_earlier_ones_as_they_were(saved: Saved, number: int) -> None:
    """Each operation of a save fails once; then the save works."""
    before = contents(saved.out)
    # what comes after the folder has its name is on the new checkpoint's side
    names = saved.save(2).operations
    last = names.index("rename checkpoint-2") + 1
    faults_met = 0
    for at in range(1, last + 1):
        for path in (saved.out / "checkpoint-2", saved.out / "checkpoint-3"):
            if path.exists():
                import shutil

                shutil.rmtree(path)
        if names[at - 1].startswith("unlink"):
            continue  # a deletion may fail: what it leaves is swept at the next start
        with pytest.raises(RunError) as failed:
            saved.save(2, faults.once(at, number))
        assert "could not be written" in str(failed.value)
        assert "bytes) are needed" in str(failed.value)
        assert "\n" not in str(failed.value)
        assert {name: data for name, data in contents(saved.out).items() if ".staging" not in name} == before
        saved.save(2)
        assert latest_complete(saved.out) == saved.out / "checkpoint-2"
        faults_met += 1
    assert faults_met > 15


def test_a_disk_that_stays_full_and_then_has_room(saved: Saved) -> None:
    before = contents(saved.out)
    for at in range(1, 12):
        with pytest.raises(RunError, match="No space left"):
            saved.save(2, faults.full_from(at))
        assert contents(saved.out) == before
    saved.save(2)
    verify(saved.out / "checkpoint-2")


def test_short_writes_lose_nothing(saved: Saved) -> None:
    plan: faults.Plan = lambda number, name, path: (  # noqa: E731
        faults.SHORT if name == "write" and "safetensors" not in path else None
    )
    done = saved.save(2, plan).operations
    assert sum(name.startswith("write") for name in done) > 100
    verify(saved.out / "checkpoint-2")


def test_a_rotation_that_fails_has_the_new_checkpoint_already(saved: Saved) -> None:
    saved.save(2)
    with pytest.raises(RunError, match="could not be written"):
        saved.save(3, lambda number, name, path: errno.EIO if "deleted" in path else None)
    assert latest_complete(saved.out) == saved.out / "checkpoint-3"
    saved.save(4)
    assert sorted(path.name for path in saved.out.iterdir()) == ["checkpoint-3", "checkpoint-4"]


FAILURES: dict[str, Callable[[int, str, str], Any]] = {
    "the second save": lambda number, name, path: (
        errno.ENOSPC if name == "write" and "checkpoint-2" in path and path.endswith(".safetensors") else None
    ),
    "the metrics": lambda number, name, path: (
        errno.ENOSPC if name == "write" and path == "metrics.jsonl" and number > 60 else None
    ),
    "a flush of the metrics": lambda number, name, path: (
        errno.EIO if name == "fsync" and path == "metrics.jsonl" and number > 60 else None
    ),
    "final": lambda number, name, path: errno.ENOSPC if name == "write" and "staging-final" in path else None,
    "the name of final": lambda number, name, path: errno.EACCES if name == "rename" and path == "final" else None,
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_command_fails_in_one_line_and_goes_on_when_there_is_room(
    prepared: Path, tmp_path: Path, settings: dict[str, Any], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = tinyrun.arguments(prepared, **settings, output_dir=str(out))
    with faults.Disk(out, FAILURES[name]).watched():
        assert main(words) == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "could not be written" in errors[0]
    assert "--resume" in shown.splitlines()[-1]
    assert main([*words, "--resume"]) == 0
    assert "resumed from" in capsys.readouterr().err
    straight = tmp_path / "straight"
    assert main(tinyrun.arguments(prepared, **settings, output_dir=str(straight))) == 0
    for file in ("final/adapter.safetensors", "checkpoint-3/optimizer.safetensors"):
        assert (out / file).read_bytes() == (straight / file).read_bytes()
    assert tinyrun.metrics(out) == tinyrun.metrics(straight)
