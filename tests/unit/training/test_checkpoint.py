"""Checkpoints: what is saved comes back to the bit, what is damaged is seen, what is too many goes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eulerforge.errors import CheckpointError, RunError
from eulerforge.training import checkpoint as room
from eulerforge.training import diskroom
from eulerforge.training.checkpoint import load_checkpoint, save_checkpoint
from eulerforge.training.manifest import TrainState, verify
from eulerforge.training.optimizer import make_optimizer
from eulerforge.training.rotation import latest_complete


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

    def save(
        self,
        step: int,
        *,
        run_id: str = "",
        held_out: float | None = None,
        identity: dict[str, Any] | None = None,
        **options: Any,
    ) -> Path:
        identity = identity or {"seed": 1}
        state = TrainState(step=step, tokens=10 * step, identity=identity, before={"held_out_loss": 2.0})
        state.run_id = run_id
        if held_out is not None:
            state.held_out = {"step": step, "loss": held_out}
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
    base_too = [{"step": 0, "trainable": ["lora", "attn_lora", "base_ffn"]}]
    for changes, message in (
        ({"injection__lora_r": 2}, "has shape"),
        ({"injection__attn_lora.enabled": False}, "12 tensors differ"),
        ({"training__phases": base_too}, "9 tensors differ"),
    ):
        other = make_run(**changes)
        optimizer = make_optimizer(other.model, other.phases.groups, other.config.training)
        before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder, other.model, optimizer, other.phases.trained_names)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.model.state_dict().items())


def test_base_weights_come_back_with_the_adapters(make_run: Callable[..., Any]) -> None:
    phases = [{"step": 0, "trainable": ["lora", "attn_lora", "base_ffn"]}]
    run = make_run(training__phases=phases)
    folder = Saved(run).save(1)
    fresh = make_run(training__phases=phases)
    base = room.load_trained(folder, fresh.model)
    assert len(base) == 9
    assert all(name.endswith(".base_layer.weight") for name in base)
    want = dict(run.model.named_parameters())
    assert all(torch.equal(parameter, want[name]) for name, parameter in fresh.model.named_parameters())
    (folder / "adapter.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        room.load_trained(folder, fresh.model)


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


def names(out: Path) -> list[str]:
    return sorted((path.name for path in out.iterdir()), key=lambda name: int(name.rpartition("-")[2]))


def test_keep_best_goes_by_the_held_out_loss_and_the_newest_stays(saved: Saved) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 1.0), (5, None)):
        saved.save(step, held_out=loss, keep_best=2)
    assert names(saved.out) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    saved.save(6, held_out=0.5, keep_best=1, keep_last=2)
    assert names(saved.out) == ["checkpoint-5", "checkpoint-6"]


def test_losses_of_other_rows_do_not_compete(saved: Saved) -> None:
    """The new rows are easier: no later checkpoint may push out the best on the old ones, nor be pushed out by it."""
    for step, loss, rows in ((1, 2.0, "a"), (2, 3.0, "a"), (3, 1.0, "b"), (4, 0.5, "b"), (5, 0.7, "b")):
        saved.save(step, held_out=loss, keep_best=1, identity={"data.validation": rows})
    assert names(saved.out) == ["checkpoint-1", "checkpoint-4", "checkpoint-5"]


def test_a_held_out_loss_that_is_no_number_is_never_the_best(saved: Saved) -> None:
    for step, loss in ((1, 2.0), (2, 1.0), (3, float("nan")), (4, 3.0)):
        saved.save(step, held_out=loss, keep_best=1)
    assert names(saved.out) == ["checkpoint-2", "checkpoint-4"]
    folder = saved.save(5, held_out=float("nan"))
    assert verify(folder)["held_out_loss"] is None
    assert room.read_state(folder).held_out == {"step": 5, "loss": None}
    assert not any("NaN" in path.read_text() for path in folder.glob("*.json"))


def test_a_damaged_checkpoint_never_takes_the_place_of_a_good_one(saved: Saved) -> None:
    """After a fall back from a damaged 10 to 8, the one just written is the newest that counts."""
    saved.save(8)
    (saved.save(10) / "adapter.safetensors").write_bytes(b"cut")
    saved.save(9, keep_last=1)
    assert names(saved.out) == ["checkpoint-9", "checkpoint-10"]
    assert latest_complete(saved.out) == saved.out / "checkpoint-9"


def test_rotation_leaves_another_run_s_checkpoints_and_resume_skips_them(saved: Saved) -> None:
    for step in (1, 2, 9):
        saved.save(step, run_id="theirs")
    for step in (3, 4):
        saved.save(step, run_id="ours", keep_last=1)
    assert names(saved.out) == ["checkpoint-1", "checkpoint-2", "checkpoint-4", "checkpoint-9"]
    said: list[str] = []
    assert latest_complete(saved.out, say=said.append, run_id="ours") == saved.out / "checkpoint-4"
    assert said == ["skipped checkpoint-9: it belongs to another run (theirs, this one is ours)"]


def test_the_order_of_a_save_on_the_disk(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is flushed before the manifest that vouches for it; then one rename, then the folder's flush."""
    done: list[str] = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def name_of(path: Any) -> str:
        name = Path(path).name
        return "staging" if name.startswith(".staging-checkpoint") else "a temporary" if name[0] == "." else name

    def fsync(descriptor: int) -> None:
        done.append(f"fsync {name_of(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append(f"rename {name_of(b)}"), real_rename(a, b))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"rename {name_of(b)}"), real_replace(a, b))[1])
    saved.save(3)
    files = ["adapter.safetensors", "optimizer.safetensors", "state.json"]
    manifest, rename = done.index("rename manifest.json"), done.index("rename checkpoint-3")
    assert all(done.index(f"fsync {name}") < manifest < rename for name in files)
    assert done[rename - 1 : rename + 2] == ["fsync staging", "rename checkpoint-3", f"fsync {saved.out.name}"]
    assert done.count("rename checkpoint-3") == 1


def test_a_disk_that_is_too_full_is_known_before_anything_is_written(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in saved.save(1).iterdir()}
    monkeypatch.setattr(diskroom.shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    monkeypatch.setattr(room, "write_file", None)
    with pytest.raises(RunError) as failed:
        saved.save(2)
    tensors = sum(path.stat().st_size for path in before if path.suffix == ".safetensors")
    needed = int(re.search(r"\(([\d,]+) bytes\) are needed", str(failed.value))[1].replace(",", ""))  # type: ignore[index]
    assert tensors < needed < tensors + 2 * diskroom.SLACK_BYTES
    assert "(4,096 bytes) are free" in str(failed.value)
    assert {path: path.read_bytes() for path in before} == before
    assert names(saved.out) == ["checkpoint-1"]


def test_a_tensor_that_is_not_finite_is_never_saved(saved: Saved) -> None:
    saved.save(1)
    named = dict(saved.run.model.named_parameters())
    first = saved.run.phases.trained_names[0]
    named[first].data[0, 0] = float("nan")
    with pytest.raises(RunError, match=f"{first} is not finite"):
        saved.save(2)
    assert names(saved.out) == ["checkpoint-1"]


def test_a_manifest_cannot_name_a_file_outside_its_folder(saved: Saved) -> None:
    folder = saved.save(1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"size": 0, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside its folder"):
        verify(folder)


def test_saving_the_same_step_again_replaces_it(saved: Saved) -> None:
    first = (saved.save(4) / "state.json").read_bytes()
    saved.save(4)
    verify(saved.out / "checkpoint-4")
    assert (saved.out / "checkpoint-4" / "state.json").read_bytes() == first


def test_a_full_disk_is_an_error_that_leaves_nothing(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    saved.save(1)
    monkeypatch.setattr(room, "write_file", full)
    with pytest.raises(RunError, match="No space left") as failed:
        saved.save(2)
    assert "--resume" in (failed.value.problems[0].hint or "")
    assert [path.name for path in saved.out.iterdir()] == ["checkpoint-1"]


def test_a_state_of_another_shape_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"step": 1, "surprise": 2}))
    with pytest.raises(CheckpointError, match="surprise"):
        room.read_state(tmp_path)
