"""Checkpoints: what is saved comes back to the bit, what is damaged is seen, what is too many goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eulerforge.errors import CheckpointError, RunError
from eulerforge.training import checkpoint as room
from eulerforge.training.checkpoint import TrainState, latest_complete, load_checkpoint, save_checkpoint, verify
from eulerforge.training.optimizer import make_optimizer


class Saved:
    """A run that took one made-up step and can save itself."""

    def __init__(self, run: Any) -> None:
        self.run, self.out = run, run.out
        self.optimizer = make_optimizer(run.model, run.phases.groups, run.config.training)
        named = dict(run.model.named_parameters())
        torch.manual_seed(1)
        for name in run.phases.trained_names:
            named[name].grad = torch.randn_like(named[name])
        self.optimizer.step()

    def save(self, step: int, **options: Any) -> Path:
        state = TrainState(step=step, tokens=10 * step, identity={"seed": 1}, before={"held_out_loss": 2.0})
        run = self.run
        return save_checkpoint(
            self.out, state, run.model, self.optimizer, run.report, run.phases.trained_names, **options
        )


@pytest.fixture
def saved(make_run: Callable[..., Any]) -> Saved:
    return Saved(make_run())


def test_what_is_in_it(saved: Saved) -> None:
    folder = saved.save(3)
    assert folder == saved.out / "checkpoint-3"
    names = {"adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == names
    adapters = load_file(folder / "adapter.safetensors")
    assert set(adapters) == set(saved.run.phases.trained_names)
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}
    manifest = verify(folder)
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert (manifest["step"], manifest["kind"]) == (3, "checkpoint")
    assert manifest["injection"]["parameter_count"] == sum(tensor.numel() for tensor in adapters.values())
    assert [path.name for path in saved.out.iterdir()] == ["checkpoint-3"], "nothing is left over"


def test_it_comes_back_to_the_bit(saved: Saved, make_run: Callable[..., Any]) -> None:
    folder = saved.save(3)
    fresh = make_run()
    optimizer = make_optimizer(fresh.model, fresh.phases.groups, fresh.config.training)
    state = load_checkpoint(folder, fresh.model, optimizer, fresh.phases.trained_names)
    assert state == TrainState(step=3, tokens=30, identity={"seed": 1}, before={"held_out_loss": 2.0})
    theirs = dict(fresh.model.named_parameters())
    for name, parameter in saved.run.model.named_parameters():
        assert torch.equal(parameter, theirs[name])
        ours = saved.optimizer.state.get(parameter, {})
        assert ours.keys() == optimizer.state.get(theirs[name], {}).keys()
        for key, value in ours.items():
            assert torch.equal(value, optimizer.state[theirs[name]][key])


def test_another_rank_or_other_targets_do_not_fit(saved: Saved, make_run: Callable[..., Any]) -> None:
    folder = saved.save(1)
    for changes in ({"injection__lora_r": 2}, {"injection__attn_lora.enabled": False}):
        other = make_run(**changes)
        optimizer = make_optimizer(other.model, other.phases.groups, other.config.training)
        with pytest.raises(CheckpointError, match="does not fit the model"):
            load_checkpoint(folder, other.model, optimizer, other.phases.trained_names)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("manifest.json", Path.unlink, "it is not complete"),
    ("manifest.json", _cut, "cannot be read"),
    ("manifest.json", lambda path: path.write_text('{"schema": 99, "files": {}}'), "has format 99"),
    ("manifest.json", lambda path: path.write_text("[]"), "cannot be read"),
    ("adapter.safetensors", Path.unlink, "adapter.safetensors is missing"),
    ("optimizer.safetensors", _cut, r"has \d+ bytes instead of \d+"),
    ("adapter.safetensors", _flip, "has changed since it was written"),
    ("state.json", _flip, "has changed since it was written"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_damage_is_seen_and_the_one_before_is_taken(
    saved: Saved, name: str, damage: Callable[[Path], Any], message: str
) -> None:
    older, newer = saved.save(9), saved.save(10)
    said: list[str] = []
    assert latest_complete(saved.out, say=said.append) == newer
    assert said == []
    damage(newer / name)
    with pytest.raises(CheckpointError, match=message):
        verify(newer)
    assert latest_complete(saved.out, say=said.append) == older
    assert len(said) == 1
    assert said[0].startswith("skipped checkpoint-10: ")


def test_no_checkpoint_no_answer(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert latest_complete(tmp_path) is None


def test_keep_last_deletes_the_oldest(saved: Saved) -> None:
    for step in (2, 10, 9):
        saved.save(step)
    saved.save(11, keep_last=2)
    assert sorted(path.name for path in saved.out.iterdir()) == ["checkpoint-10", "checkpoint-11"]


def test_saving_the_same_step_again_replaces_it(saved: Saved) -> None:
    first = (saved.save(4) / "state.json").read_bytes()
    saved.save(4)
    verify(saved.out / "checkpoint-4")
    assert (saved.out / "checkpoint-4" / "state.json").read_bytes() == first


def test_a_full_disk_is_an_error_that_leaves_nothing(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    saved.save(1)
    monkeypatch.setattr(room, "save_file", full)
    with pytest.raises(RunError, match="No space left") as failed:
        saved.save(2)
    assert "--resume" in (failed.value.problems[0].hint or "")
    assert [path.name for path in saved.out.iterdir()] == ["checkpoint-1"]


def test_a_state_of_another_shape_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"step": 1, "surprise": 2}))
    with pytest.raises(CheckpointError, match="surprise"):
        room.read_state(tmp_path)
