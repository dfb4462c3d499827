"""Which checkpoint a path means, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eulerforge.api import InjectionReport
from eulerforge.errors import CheckpointError
from eulerforge.export.rundir import locate, unwrapped_name
from eulerforge.training.checkpoint import ADAPTER_FILE
from eulerforge.training.manifest import TrainState, write_manifest, write_state
from eulerforge.training.outdir import CONFIG_FILE

REPORT = InjectionReport(strategy="dense_lora", layers=(0,), depth=1, sites=())


def checkpoint(folder: Path, step: int) -> Path:
    """A complete checkpoint with one tensor."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file({"a": torch.full((2,), float(step))}, folder / ADAPTER_FILE)
    write_state(folder, TrainState(step=step))
    write_manifest(folder, "checkpoint", step, REPORT)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for step in (2, 4, 10):
        checkpoint(folder / f"checkpoint-{step}", step)
    checkpoint(folder / "final", 12)
    (folder / CONFIG_FILE).write_text("")
    return folder


def test_a_run_means_its_final_state(run: Path) -> None:
    found = locate(run)
    assert (found.folder, found.checkpoint, found.state.step) == (run, run / "final", 12)
    assert not found.notes


def test_a_step_means_its_checkpoint(run: Path) -> None:
    assert locate(run, 4).checkpoint == run / "checkpoint-4"
    with pytest.raises(CheckpointError) as caught:
        locate(run, 5)
    assert "checkpoint-2, checkpoint-4, checkpoint-10" in str(caught.value.problems[0].hint)


@pytest.mark.parametrize(("name", "step"), [("final", 12), ("checkpoint-4", 4)])
def test_a_checkpoint_s_folder_means_itself(run: Path, name: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(run / name).state.step == step
    monkeypatch.chdir(run / name)
    here = locate(Path())
    assert (here.state.step, here.folder.name) == (step, "run")


def test_without_a_final_state_the_newest_complete_checkpoint_is_used_and_named(run: Path) -> None:
    (run / "final").rename(run.parent / "away")
    assert locate(run).checkpoint == run / "checkpoint-10"
    assert "checkpoint-10 is used" in locate(run).notes[0]
    (run / "checkpoint-10" / ADAPTER_FILE).write_bytes(b"cut")
    said: list[str] = []
    assert locate(run, say=said.append).checkpoint == run / "checkpoint-4"
    assert any("checkpoint-10" in line for line in said)


def test_a_run_that_saved_nothing_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text("")
    with pytest.raises(CheckpointError) as caught:
        locate(tmp_path)
    assert "--resume" in str(caught.value.problems[0].hint)


def test_a_named_checkpoint_that_is_damaged_is_not_replaced_by_another(run: Path) -> None:
    (run / "final" / ADAPTER_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors is missing"):
        locate(run)


def test_a_folder_without_a_preset_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no run"):
        locate(checkpoint(tmp_path / "lonely" / "final", 1))


def test_names_lose_the_wrapper() -> None:
    assert unwrapped_name("model.layers.0.mlp.up_proj.base_layer.weight") == "model.layers.0.mlp.up_proj.weight"
    assert unwrapped_name("model.norm.weight") == "model.norm.weight"
