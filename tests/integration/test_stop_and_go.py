"""What comes from outside while a run trains: signals at any moment, terminals that close, and what is resumed then."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinyrun

from eulerforge.cli.main import main
from eulerforge.training import loop, measured, saves
from eulerforge.training.manifest import read_state, verify

SETTINGS: dict[str, Any] = {
    "data__validation__size": 6,
    "injection__lora_dropout": 0.1,
    "training__max_train_steps": 6,
    "training__save_steps": 2,
    "training__val_steps": 2,
    "training__threads": 1,
    "evaluation__samples": 2,
    "evaluation__max_new_tokens": 4,
    "evaluation__batch_size": 1,
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tinyrun.prepare(tmp_path_factory.mktemp("straight"))
    assert main(tinyrun.arguments(folder, **SETTINGS)) == 0
    return folder / "run"


def words(straight: Path, out: Path, **changes: Any) -> list[str]:
    return tinyrun.arguments(straight.parent, **{**SETTINGS, "output_dir": str(out), **changes})


def assert_equal(straight: Path, out: Path) -> None:
    for name in ("checkpoint-6/adapter.safetensors", "checkpoint-6/optimizer.safetensors", "final/adapter.safetensors"):
        assert (straight / name).read_bytes() == (out / name).read_bytes(), name
    assert tinyrun.metrics(straight) == tinyrun.metrics(out)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (straight, out)]
    assert [summary["samples"] for summary in summaries] == [summaries[0]["samples"]] * 2
    assert summaries[0]["held_out"] == summaries[1]["held_out"]


def calling(number: int, nth: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """``real``, with a signal to this process before its n-th call."""
    calls = 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), number)
        return real(*args, **options)

    return call


MOMENTS: dict[str, tuple[Any, str, int]] = {
    "in a step": (loop, "label_token_loss", 3),
    "in a validation": (measured, "held_out_loss", 2),
    "in the first sample": (measured, "generate_answers", 1),
    "in a sample of the tuned model": (measured, "generate_answers", 4),
    "in the last validation": (measured, "held_out_loss", 4),
    "in a save": (saves, "save_checkpoint", 1),
}
SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_at_any_moment_loses_nothing(
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
    number: signal.Signals,
    code: int,
) -> None:
    room, name, nth = MOMENTS[moment]
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(room, name, calling(number, nth, getattr(room, name)))
        assert main(words(straight, out)) == code
    shown = capsys.readouterr().err
    (error,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    step = int(error.split("stopped at step ")[1].split()[0])
    assert f"checkpoint-{step} is saved" in error
    assert (out / f"checkpoint-{step}" / "manifest.json").exists()
    assert not (out / "final").exists()
    assert main([*words(straight, out), "--resume"]) == 0
    assert_equal(straight, out)


def test_the_best_checkpoint_is_kept_wherever_it_was_measured(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the stop that gave up its validation, and at the end of a run that is made longer and worse."""
    best = {"checkpoint__keep_best": 1, "training__scheduler": "constant"}
    worse = ["--resume", "--set", "training.lr=9.0", "--allow-changed", "training.lr"]
    stopped, ended = tmp_path / "stopped", tmp_path / "ended"
    with monkeypatch.context() as patched:
        patched.setattr(measured, "held_out_loss", calling(signal.SIGTERM, 3, measured.held_out_loss))
        assert main(words(straight, stopped, **best)) == 143
    assert main(words(straight, ended, **best, training__max_train_steps=4)) == 0
    for out in (stopped, ended):
        assert main([*words(straight, out, **best), *worse]) == 0
        losses = {row["step"]: row["held_out_loss"] for row in tinyrun.metrics(out) if "held_out_loss" in row}
        assert min(losses, key=lambda step: losses[step]) == 4
        assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
        for step in (4, 6):
            assert verify(out / f"checkpoint-{step}")["held_out_loss"] == losses[step]


def test_stopped_twice_in_a_row_and_killed_in_between(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    for nth, resume in ((2, []), (2, ["--resume"])):
        with monkeypatch.context() as patched:
            patched.setattr(loop, "label_token_loss", calling(signal.SIGTERM, nth, loop.label_token_loss))
            assert main([*words(straight, out), *resume]) == 143
    process = subprocess.Popen(
        [sys.executable, "-m", "eulerforge", *words(straight, out), "--resume"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 5/"):
            break
    process.kill()
    process.wait()
    process.stderr.close()
    assert main([*words(straight, out), "--resume"]) == 0
    assert_equal(straight, out)
    resumed = json.loads((out / "receipt.json").read_text())["resumed"]
    assert [part["changed"] for part in resumed] == [[]] * len(resumed)
    assert [part["step"] for part in resumed][:2] == [2, 4]


def test_a_second_ctrl_c_stops_at_once_and_the_last_checkpoint_is_whole(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, real = tmp_path / "run", loop.label_token_loss

    def twice(*args: Any, **options: Any) -> Any:
        if len(tinyrun.metrics(out)) == 5:  # the base, steps 1 and 2, a validation, step 3
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "label_token_loss", twice)
        assert main(words(straight, out)) == 130
    assert "error: stopped by SIGINT at once, after step 3 of 6" in capsys.readouterr().err
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert main([*words(straight, out), "--resume"]) == 0
    assert_equal(straight, out)


@pytest.mark.parametrize("how", ["a reader that goes away", "closed from the start"])
def test_nobody_listens_and_the_run_ends_well(straight: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "eulerforge", *words(straight, out)]
    if how == "closed from the start":
        code = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *command]).returncode
    else:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stderr.readline()
        process.stderr.close()
        process.stdout.close()
        code = process.wait()
    assert code == 0
    assert_equal(straight, out)


def test_two_runs_never_share_a_folder(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "eulerforge", *words(straight, out, training__max_train_steps=100_000)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (out / "checkpoint-2" / "manifest.json").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        for option in ("--resume", "--overwrite"):
            assert main([*words(straight, out), option]) == 2
            assert f"another run is writing to {out} (process {process.pid})" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()


def cut(straight: Path, out: Path, step: int) -> Path:
    """The run as it was after ``step``."""
    shutil.copytree(straight, out)
    for path in [out / "final", *(path for path in out.glob("checkpoint-*") if int(path.name[11:]) > step)]:
        shutil.rmtree(path)
    return out


def test_an_allowed_change_goes_on_and_is_in_the_receipt(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = cut(straight, tmp_path / "run", 4)
    changes = {"training__lr": 0.001, "seed": 7}
    assert main([*words(straight, out, **changes), "--resume", "--allow-changed", "seed"]) == 2
    shown = capsys.readouterr().err
    assert "error: training.lr: was 0.02 at the newest checkpoint and is 0.001 now" in shown
    assert "--allow-changed training.lr" in shown
    allowed = ["--resume", "--allow-changed", "seed", "--allow-changed", "training.lr"]
    assert main([*words(straight, out, **changes), *allowed]) == 0
    assert "warning: seed was 42 and is 7 now, as allowed" in capsys.readouterr().err
    (part,) = json.loads((out / "receipt.json").read_text())["resumed"]
    assert part["step"] == 4
    assert {fact["key"]: (fact["was"], fact["now"]) for fact in part["changed"]} == {
        "seed": (42, 7),
        "training.lr": (0.02, 0.001),
    }
    assert (out / "final" / "adapter.safetensors").read_bytes() != (
        straight / "final" / "adapter.safetensors"
    ).read_bytes()


def test_losses_of_other_rows_are_not_compared(straight: Path, tmp_path: Path) -> None:
    out = cut(straight, tmp_path / "run", 4)
    changes = {"data__validation__size": 8, "checkpoint__keep_best": 1}
    assert main([*words(straight, out, **changes), "--resume", "--allow-changed", "data"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    held_out = summary["held_out"]
    assert (held_out["before"], held_out["change"]) == (None, None)
    assert held_out["after"] > 0
    # the base's answers to the same prompts are still the base's
    known = {
        sample["prompt"]: sample["base"] for sample in json.loads((straight / "summary.json").read_text())["samples"]
    }
    assert [sample["base"] for sample in summary["samples"]] == [known.get(s["prompt"]) for s in summary["samples"]]
    # measured on the new rows at once, and never held against the old ones
    measured = [row for row in tinyrun.metrics(out) if "held_out_loss" in row]
    tokens = {row["step"]: row["held_out_tokens"] for row in measured}
    assert sorted(tokens) == [0, 2, 4, 6]
    assert tokens[0] == tokens[2] < tokens[4] == tokens[6]
    assert read_state(out / "checkpoint-6").held_out["step"] == 6


def test_what_was_measured_of_another_base_is_forgotten(straight: Path, tmp_path: Path) -> None:
    out = cut(straight, tmp_path / "run", 4)
    other = shutil.copytree(straight.parent / "base", tmp_path / "base")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    changes = {"model_name": str(other)}
    assert main([*words(straight, out, **changes), "--resume", "--allow-changed", "model_name"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out"]["before"] is None
    assert {sample["base"] for sample in summary["samples"]} == {None}


def test_a_shape_that_does_not_fit_is_refused_even_when_allowed(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = cut(straight, tmp_path / "run", 4)
    assert main([*words(straight, out, injection__lora_r=2), "--resume", "--allow-changed", "injection"]) == 2
    assert "has shape (4, 32), not (2, 32)" in capsys.readouterr().err
    for change in ({"injection__lora_r": 2}, {"injection__start_layer": 1}):
        assert main([*words(straight, out, **change), "--resume"]) == 2
        shown = capsys.readouterr().err
        assert "the checkpoint's adapters do not fit those of now" in shown
        assert "--allow-changed" not in shown
    assert main([*words(straight, out, injection__lora_alpha=2), "--resume"]) == 2
    assert "--allow-changed injection.lora_alpha" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"training__save_steps": 1, "training__log_steps": 3},
        {"training__gradient_checkpointing": True},
        {"checkpoint__keep_last": 1, "checkpoint__include_base": False},
        {"evaluation__batch_size": 2},
    ],
    ids=str,
)
def test_what_may_change_silently_changes_no_bit(
    straight: Path, tmp_path: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = cut(straight, tmp_path / "run", 2)
    assert main([*words(straight, out, **change), "--resume"]) == 0
    assert "warning" not in capsys.readouterr().err
    for name in ("checkpoint-6/adapter.safetensors", "checkpoint-6/optimizer.safetensors", "final/adapter.safetensors"):
        assert (straight / name).read_bytes() == (out / name).read_bytes(), name


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_without_a_curve_is_made_longer(straight: Path, tmp_path: Path, finished: bool) -> None:
    constant = {"training__scheduler": "constant"}
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert main(words(straight, whole, **constant)) == 0
    assert main(words(straight, out, **constant, training__max_train_steps=4)) == 0
    if not finished:
        shutil.rmtree(out / "final")
    assert main([*words(straight, out, **constant), "--resume"]) == 0
    for name in ("checkpoint-6/optimizer.safetensors", "final/adapter.safetensors"):
        assert (whole / name).read_bytes() == (out / name).read_bytes()


def test_more_epochs_make_a_finished_run_longer(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    epochs = {"training__scheduler": "constant", "training__max_train_steps": None, "training__save_steps": 100}
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert main(words(straight, whole, **epochs, training__num_epochs=2)) == 0
    assert main(words(straight, out, **epochs, training__num_epochs=1)) == 0
    capsys.readouterr()
    assert main([*words(straight, out, **epochs, training__num_epochs=1), "--resume"]) == 0
    assert "nothing is left to train" in capsys.readouterr().err
    one = tmp_path / "final of one"
    shutil.copytree(out / "final", one)
    assert main([*words(straight, out, **epochs, training__num_epochs=2), "--resume"]) == 0
    assert "nothing is left to train" not in capsys.readouterr().err
    # as a kill right after the second command began leaves it: the new configuration, and no newer checkpoint
    shutil.rmtree(out / "final")
    shutil.copytree(one, out / "final")
    for folder in out.glob("checkpoint-*"):
        if read_state(folder).step > read_state(one).step:
            shutil.rmtree(folder)
    assert main([*words(straight, out, **epochs, training__num_epochs=2), "--resume"]) == 0
    assert "nothing is left to train" not in capsys.readouterr().err
    assert (whole / "final/adapter.safetensors").read_bytes() == (out / "final/adapter.safetensors").read_bytes()


def test_a_longer_run_that_was_stopped_is_unfinished(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = {"training__scheduler": "constant"}
    out = tmp_path / "run"
    assert main(words(straight, out, **constant, training__max_train_steps=4)) == 0
    four = tmp_path / "final of four"
    shutil.copytree(out / "final", four)
    assert main([*words(straight, out, **constant), "--resume"]) == 0
    # as a kill between the last checkpoint and the end leaves it
    shutil.rmtree(out / "final")
    shutil.copytree(four, out / "final")
    capsys.readouterr()
    assert main(words(straight, out, **constant)) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert main(["merge", str(out), "--output", str(tmp_path / "merged")]) == 0
    assert "the run is not finished: checkpoint-6 is used" in capsys.readouterr().err
    assert main([*words(straight, out, **constant), "--resume"]) == 0
    assert read_state(out / "final").step == 6


def test_a_finished_run_without_checkpoints_is_not_begun_anew(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    for folder in out.glob("checkpoint-*"):
        shutil.rmtree(folder)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main([*words(straight, out, training__max_train_steps=9), "--resume"]) != 0
    assert "is finished at step 6 and has no complete checkpoint to go on from" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["final without its largest file", "no final, one checkpoint", "final alone"])
def test_resume_never_begins_anew_over_what_is_left(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    for folder in out.glob("checkpoint-*"):
        shutil.rmtree(folder)
    if damage == "no final, one checkpoint":
        (out / "final").rename(out / "checkpoint-6")
        (out / "checkpoint-6" / "adapter.safetensors").unlink()
    else:
        name = "manifest.json" if damage == "final alone" else "model_with_adapters.safetensors"
        (out / "final" / name).unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([*words(straight, out), "--resume"]) == 2
    shown = capsys.readouterr().err
    assert f"{out} has no complete checkpoint to go on from, and step 0 on would write over" in shown
    assert "will be written again" not in shown
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    if damage == "final without its largest file":
        assert main(["merge", str(out), "--output", str(tmp_path / "merged")]) == 0


def test_a_run_whose_receipt_is_lost_goes_on(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = cut(straight, tmp_path / "run", 4)
    (out / "receipt.json").unlink()
    (out / "summary.json").unlink()
    assert main([*words(straight, out), "--resume"]) == 0
    shown = capsys.readouterr().err
    assert "receipt.json cannot be read: the run is that of checkpoint-4" in shown
    assert f"resumed from {out / 'checkpoint-4'} at step 4" in shown
    assert_equal(straight, out)
    assert json.loads((out / "receipt.json").read_text())["run_id"] == read_state(straight / "final").run_id


def test_a_finished_run_whose_curve_has_ended_is_not_made_longer(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    assert main([*words(straight, out, training__max_train_steps=9), "--resume"]) != 0
    assert "training.max_train_steps: was 6 at the newest checkpoint and is 9 now" in capsys.readouterr().err
    assert (out / "final" / "adapter.safetensors").read_bytes() == (straight / "final/adapter.safetensors").read_bytes()


def test_a_damaged_summary_of_a_finished_run_is_said(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    for content in (b"\xff", b'{"steps": ', b"7"):
        (out / "summary.json").write_bytes(content)
        assert main([*words(straight, out), "--resume"]) == 0
        shown = capsys.readouterr()
        assert f"warning: {out / 'summary.json'} cannot be read: " in shown.err
        assert f"{out} is finished" in shown.out


def test_another_torch_is_said_and_recorded(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = cut(straight, tmp_path / "run", 4)
    receipt = json.loads((out / "receipt.json").read_text())
    receipt["libraries"]["torch"] = "1.0"
    (out / "receipt.json").write_text(json.dumps(receipt))
    assert main([*words(straight, out), "--resume"]) == 0
    assert 'warning: libraries.torch was "1.0" and is ' in capsys.readouterr().err
    assert json.loads((out / "receipt.json").read_text())["resumed"][0]["soft"][0]["key"] == "libraries.torch"


def test_a_damaged_final_is_written_again(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    (out / "final" / "adapter.safetensors").write_bytes(b"cut")
    assert main([*words(straight, out), "--resume"]) == 0
    assert "it will be written again" in capsys.readouterr().err
    assert_equal(straight, out)
