"""eulerforge replay: the same numbers again, or the first that is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tinyrun
import torch
from safetensors.torch import load_file, save_file

from eulerforge.cli.main import main
from eulerforge.config.atomic import sha256_of
from eulerforge.training.manifest import MANIFEST_FILE
from eulerforge.training.replay import _last_change

SETTINGS: dict[str, Any] = {
    "data__validation__size": 4,
    "injection__lora_dropout": 0.1,
    "training__max_train_steps": 6,
    "training__save_steps": 2,
    "training__val_steps": 2,
    "training__threads": 1,
    "training__phases": [{"step": 0, "trainable": ["lora"]}, {"step": 3, "trainable": ["attn_lora"]}],
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tinyrun.prepare(tmp_path_factory.mktemp("straight"))
    assert main(tinyrun.arguments(folder, **SETTINGS)) == 0
    return folder / "run"


@pytest.fixture
def run(straight: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(straight, tmp_path / "run"))


@pytest.mark.parametrize(
    ("options", "start", "end", "folders"),
    [
        (["--steps", "2"], 4, 6, ["checkpoint-6", "final"]),
        (["--steps", "3"], 2, 5, ["checkpoint-4"]),
        (["--steps", "6"], 0, 6, ["checkpoint-2", "checkpoint-4", "checkpoint-6", "final"]),
        (["--steps", "1", "--from", "2"], 2, 3, []),
    ],
)
def test_the_same_steps_give_the_same_numbers(
    run: Path,
    options: list[str],
    start: int,
    end: int,
    folders: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    assert main(["replay", str(run), *options, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert (data["start"], data["end"], data["folders"]) == (start, end, folders)
    assert data["numbers"] >= 5 * (end - start)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before, "nothing is written"


def test_it_says_so_to_a_person(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run), "--steps", "2"]) == 0
    assert capsys.readouterr().out.startswith("steps 5 to 6 match to the bit: 10 numbers and ")


def test_a_recorded_loss_that_differs_is_the_first_difference(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for row in lines:
        if row["step"] == 4 and "loss" in row:
            row["loss"] = float(torch.nextafter(torch.tensor(row["loss"], dtype=torch.float64), torch.tensor(9.0)))
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert main(["replay", str(run), "--steps", "4", "--from", "2"]) == 1
    assert "loss of step 4 was " in capsys.readouterr().err
    assert main(["replay", str(run), "--steps", "2"]) == 0


def test_a_checkpoint_that_training_would_not_give_is_named_with_its_tensor(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its manifest fits, so only training again can tell."""
    folder = run / "checkpoint-6"
    tensors = load_file(folder / "adapter.safetensors")
    name = sorted(tensors)[3]
    tensors[name].view(-1)[0] += 1.0
    save_file(tensors, folder / "adapter.safetensors", metadata={"format": "pt"})
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    path = folder / "adapter.safetensors"
    manifest["files"][path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert main(["replay", str(run), "--steps", "2"]) == 1
    shown = capsys.readouterr().err
    assert f"{name} after step 6 is not that of checkpoint-6/adapter.safetensors, by 1.000e+00" in shown


def test_what_cannot_be_replayed_is_a_usage_error(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, words in (
        (["--steps", "7"], "more than the 6 that"),
        (["--steps", "1", "--from", "3"], "no complete checkpoint of step 3"),
        (["--steps", "0"], "--steps"),
    ):
        assert main(["replay", str(run), *options]) == 2
        assert words in capsys.readouterr().err
    assert main(["replay", str(tmp_path), "--steps", "1"]) == 2
    assert "is no run" in capsys.readouterr().err
    (run / "checkpoint-4" / "optimizer.safetensors").write_bytes(b"cut")
    assert main(["replay", str(run), "--steps", "2", "--from", "4"]) == 2
    assert "skipped checkpoint-4" in capsys.readouterr().err


def test_changed_data_is_refused_before_anything_is_trained(
    run: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run / "resolved_config.toml"
    other = tmp_path / "other.jsonl"
    other.write_text("".join(sorted((straight.parent / "rows.jsonl").read_text().splitlines(keepends=True))))
    config.write_text(config.read_text().replace(str(straight.parent / "rows.jsonl"), str(other)))
    assert main(["replay", str(run), "--steps", "2"]) == 2
    shown = capsys.readouterr().err
    assert "error: data: was " in shown
    assert "hint: put it back as it was" in shown
    assert "--allow-changed" not in shown
    assert "--overwrite" not in shown


def test_steps_from_before_an_allowed_change_are_refused(
    run: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("final", "checkpoint-6"):
        shutil.rmtree(run / name)
    words = tinyrun.arguments(straight.parent, **{**SETTINGS, "output_dir": str(run), "training__lr": 0.01})
    assert main([*words, "--resume", "--allow-changed", "training.lr"]) == 0
    for options in (["--steps", "3", "--from", "2"], ["--steps", "2", "--from", "0"], ["--steps", "4"]):
        capsys.readouterr()
        assert main(["replay", str(run), *options]) == 2
        shown = capsys.readouterr().err
        assert "--from: training.lr changed at step 4 of " in shown
        assert "hint: --from 4 --steps 2" in shown
    assert main(["replay", str(run), "--from", "4", "--steps", "2"]) == 0
    (run / "checkpoint-4").rename(run.parent / "checkpoint-4")
    assert main(["replay", str(run), "--steps", "4", "--from", "2"]) == 2
    assert "no checkpoint from the change on is there to start from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parts", "step", "keys"),
    [
        ([], 0, []),
        ([(4, [])], 0, []),
        ([(2, ["seed"]), (4, []), (8, ["training.lr", "data"])], 8, ["training.lr", "data"]),
        ([(2, ["seed"]), (8, ["training.lr"]), (6, [])], 2, ["seed"]),
        ([(8, ["training.lr"]), (8, ["training.lr"])], 8, ["training.lr"]),
    ],
    ids=["never resumed", "resumed", "the newest", "undone", "begun twice"],
)
def test_the_change_that_counts_is_the_newest_that_still_holds(
    tmp_path: Path, parts: list[tuple[int, list[str]]], step: int, keys: list[str]
) -> None:
    resumed = [{"step": began, "changed": [{"key": key} for key in changed]} for began, changed in parts]
    (tmp_path / "receipt.json").write_text(json.dumps({"resumed": resumed}))
    assert _last_change(tmp_path) == (step, keys)
