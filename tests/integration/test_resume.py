"""A run that was stopped and goes on computes, to the bit, what an uninterrupted one does."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import tinyrun
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from eulerforge.cli.main import main

# 19 training rows and 4 rows a step: the epochs end within steps 5, 10; the phases change at 3 and 7
TOTAL = 12
SETTINGS: dict[str, Any] = {
    "data__validation__size": 5,
    "injection__lora_dropout": 0.1,
    "training__batch_size": 2,
    "training__grad_accum_steps": 2,
    "training__warmup_steps": 2,
    "training__max_train_steps": TOTAL,
    "training__save_steps": 1,
    "training__val_steps": 4,
    "training__threads": 1,
    "training__phases": [
        {"step": 0, "trainable": ["lora", "attn_lora"]},
        {"step": 3, "trainable": ["lora"]},
        {"step": 7, "trainable": ["attn_lora", "lora"]},
    ],
    "evaluation__samples": 1,
    "evaluation__max_new_tokens": 4,
}


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    """``training.threads`` sets them for the process; the next module gets its own back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted, with a checkpoint after each step; tests only read it."""
    folder = tinyrun.prepare(tmp_path_factory.mktemp("straight"))
    assert main(tinyrun.arguments(folder, **SETTINGS)) == 0
    return folder / "run"


def interrupted(straight: Path, out: Path, step: int) -> Path:
    """What a power failure after ``step`` leaves: the checkpoint, and metrics that have gone further."""
    shutil.copytree(straight, out)
    for path in out.iterdir():
        if path.name == "final" or (path.name.startswith("checkpoint-") and int(path.name[11:]) > step):
            shutil.rmtree(path)
    (out / "summary.json").unlink()
    return out


def resume(straight: Path, out: Path, **changes: Any) -> int:
    settings = {**SETTINGS, "output_dir": str(out), **changes}
    return main([*tinyrun.arguments(straight.parent, **settings), "--resume"])


def assert_same(left: Path, right: Path) -> None:
    """Every tensor of two folders' adapter and optimizer files is the same to the bit."""
    compared = 0
    for file in tinyrun.FILES:
        if (left / file).exists() or (right / file).exists():
            ours, theirs = load_file(left / file), load_file(right / file)
            assert ours.keys() == theirs.keys()
            assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
            compared += len(ours)
    assert compared


@pytest.mark.parametrize("step", [1, 3, 4, 5, 7, 8, 10, 11, TOTAL])
def test_resume_is_exact(straight: Path, tmp_path: Path, step: int, capsys: pytest.CaptureFixture[str]) -> None:
    """In an epoch, at and over its edge, before, at and after a change of phase, at a validation, and at the end."""
    out = interrupted(straight, tmp_path / "run", step)
    torch.manual_seed(step)  # whatever the process has drawn before plays no part
    assert resume(straight, out) == 0
    assert f"resumed from {out / f'checkpoint-{step}'} at step {step}" in capsys.readouterr().err
    for name in (f"checkpoint-{TOTAL}", "final"):
        assert_same(straight / name, out / name)
    assert tinyrun.metrics(out)[: len(tinyrun.metrics(straight))] == tinyrun.metrics(straight)
    for key in ("tokens", "label_tokens", "identity", "before"):
        states = [json.loads((folder / "final" / "state.json").read_text())[key] for folder in (straight, out)]
        assert states[0] == states[1]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (straight, out)]
    assert summaries[0]["held_out"] == summaries[1]["held_out"]
    assert summaries[0]["samples"] == summaries[1]["samples"]


def test_metrics_hold_every_step_once_and_every_validation_once(straight: Path, tmp_path: Path) -> None:
    for run in (straight, interrupted(straight, tmp_path / "run", TOTAL)):
        if run != straight:
            assert resume(straight, run) == 0
        rows = tinyrun.metrics(run)
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, TOTAL + 1))
        assert [row["step"] for row in rows if "held_out_loss" in row] == [0, 4, 8, TOTAL]


def test_every_row_is_seen_once_an_epoch(straight: Path) -> None:
    rows = [row for row in tinyrun.metrics(straight) if "loss" in row]
    run = tinyrun.assembled(straight.parent, **SETTINGS)
    assert rows[-1]["epoch"] == pytest.approx(TOTAL * 4 / 19)
    # 19 steps of 4 rows are 4 whole epochs
    from eulerforge.data.batches import BatchPlan

    plan = BatchPlan(run.datasets.train, 2, 2, run.config.seed)
    seen = [row for step in range(19) for part in plan.step_rows(step) for row in part]
    for epoch in range(4):
        assert sorted(seen[19 * epoch : 19 * (epoch + 1)]) == list(range(19))


def test_a_run_with_the_date_in_its_rows_goes_on_after_midnight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tinyrun.prepare(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder / "base")
    settings = {**SETTINGS, "training__max_train_steps": 3, "training__phases": None, "data__template": "chat"}
    monkeypatch.setattr("eulerforge.data.render.today", lambda: date(2026, 12, 31))
    assert main(tinyrun.arguments(folder, **settings)) == 0
    out = interrupted(folder / "run", tmp_path / "again", 2)
    assert 'date = "2026-12-31"' in (out / "resolved_config.toml").read_text()
    capsys.readouterr()
    monkeypatch.setattr("eulerforge.data.render.today", lambda: date(2027, 1, 1))
    assert resume(folder / "run", out, **settings | {"output_dir": str(out)}) == 0
    assert "rows are rendered as of 2026-12-31" in capsys.readouterr().err
    assert_same(folder / "run" / "checkpoint-3", out / "checkpoint-3")
    # another day that was asked for is other data
    shutil.rmtree(out)
    interrupted(folder / "run", out, 2)
    assert resume(folder / "run", out, **settings | {"output_dir": str(out), "data__date": "2027-01-01"}) == 2
    assert "data: was" in capsys.readouterr().err


def test_a_finished_run_resumed_does_nothing(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    (out / "final" / "adapter.safetensors").touch()  # nothing is even read of it
    before[out / "final" / "adapter.safetensors"] = (out / "final" / "adapter.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert resume(straight, out) == 0
    captured = capsys.readouterr()
    assert "nothing is left to train" in captured.err
    assert f"written to {straight / 'final'}" in captured.out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == before


def test_a_used_folder_is_refused_before_anything_is_done(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tinyrun.arguments(straight.parent, **SETTINGS)
    before = sorted(straight.rglob("*"))
    capsys.readouterr()
    assert main(words) == 2
    assert "holds a finished run" in capsys.readouterr().err
    out = interrupted(straight, tmp_path / "run", 3)
    words = tinyrun.arguments(straight.parent, **{**SETTINGS, "output_dir": str(out)})
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert "holds an unfinished run" in shown
    assert "--resume goes on with it" in shown
    assert sorted(straight.rglob("*")) == before
    assert main([*words, "--overwrite"]) == 0
    assert_same(straight / "final", out / "final")
    assert tinyrun.metrics(out) == tinyrun.metrics(straight)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 7}, "seed"),
        ({"training__batch_size": 4}, "training.batch_size"),
        ({"training__grad_accum_steps": 1}, "training.grad_accum_steps"),
        ({"data__max_length": 64, "data__max_cut_answers": 1}, "data"),
        ({"data__validation__seed": 9}, "data.validation"),
        ({"injection__lora_alpha": 16}, "injection.lora_alpha"),
        ({"injection__lora_dropout": 0.2}, "injection.lora_dropout"),
        ({"training__phases": None}, "training.phases"),
        ({"training__max_train_steps": 2}, "training.max_train_steps"),
    ],
)
def test_what_would_make_it_another_run_is_refused(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], key: str
) -> None:
    out = interrupted(straight, tmp_path / "run", 3)
    kept = (out / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert resume(straight, out, **change) == 2
    shown = capsys.readouterr().err
    assert f"error: {key}: " in shown
    assert "Traceback" not in shown
    assert (out / "metrics.jsonl").read_bytes() == kept


def test_a_folder_without_a_run_starts_anew_and_is_named(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mistyped"
    assert resume(straight, out, training__max_train_steps=1, training__phases=None) == 0
    shown = capsys.readouterr().err
    warning = f"warning: {out} holds no run to resume: a new one starts at step 0"
    assert shown.count(warning) == 1
    assert shown.index(warning) < shown.index("parameters"), "before anything is loaded"


def test_a_checkpoint_that_no_run_wrote_is_never_written_over(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = interrupted(straight, tmp_path / "run", 3)
    (out / "checkpoint-5").mkdir()
    (out / "checkpoint-5" / "trainer_state.json").write_text("mine")
    capsys.readouterr()
    assert resume(straight, out) == 2
    assert "checkpoint-5 has no manifest.json, so no run wrote it whole" in capsys.readouterr().err
    assert (out / "checkpoint-5" / "trainer_state.json").read_text() == "mine"


def test_a_changed_base_is_refused(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tiny

    out = interrupted(straight, tmp_path / "run", 3)
    other = tiny.save_tiny(tmp_path / "other", seed=1)
    assert resume(straight, out, model_name=str(other)) == 2
    assert "error: model_name: was " in capsys.readouterr().err


def test_a_damaged_checkpoint_is_skipped_and_said(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = interrupted(straight, tmp_path / "run", 6)
    path = out / "checkpoint-6" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert resume(straight, out) == 0
    shown = capsys.readouterr().err
    assert "skipped checkpoint-6: " in shown
    assert "at step 5" in shown
    assert_same(straight / "final", out / "final")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_loses_nothing(
    straight: Path, tmp_path: Path, number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    # constant: the rate must not depend on where the end is, which the test moves to where the signal came
    settings = {**SETTINGS, "training__scheduler": "constant", "training__save_steps": 0, "training__val_steps": 0}
    out = tmp_path / "my run"
    words = tinyrun.arguments(
        straight.parent, **{**settings, "output_dir": str(out), "training__max_train_steps": 1_000_000}
    )
    with subprocess.Popen(
        [sys.executable, "-m", "eulerforge", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        heard = []
        for line in process.stderr:
            heard.append(line)
            if line.startswith("step 3/"):
                process.send_signal(number)
                break
        heard += process.stderr
        assert process.wait() == code, "".join(heard)
    error, hint = heard[-2:]
    stopped = int(error.split("stopped at step ")[1].split()[0])
    assert f"checkpoint-{stopped} is saved" in error
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{stopped}"]
    command = shlex.split(hint.partition("go on with: ")[2])
    assert command == ["eulerforge", *words, "--resume"]
    end = ["--set", f"training.max_train_steps={stopped + 3}"]
    assert main([*command[1:], *end]) == 0
    assert f"at step {stopped}" in capsys.readouterr().err
    whole = tmp_path / "whole"
    changes = {**settings, "output_dir": str(whole), "training__max_train_steps": stopped + 3}
    assert main(tinyrun.arguments(straight.parent, **changes)) == 0
    assert_same(whole / "final", out / "final")
    assert_same(whole / f"checkpoint-{stopped + 3}", out / f"checkpoint-{stopped + 3}")
    assert [row for row in tinyrun.metrics(whole) if "loss" in row] == [
        row for row in tinyrun.metrics(out) if "loss" in row
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"training__val_steps": 0, "training__save_steps": 0, "evaluation__samples": 0, "training__log_steps": 7},
        {"training__gradient_checkpointing": True},
    ],
    ids=["saving and measuring", "gradient checkpointing"],
)
def test_what_counts_as_free_to_change_changes_no_bit(straight: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """--resume lets these keys change without a word, so they must not touch what is trained; dropout is on."""
    out = tmp_path / "run"
    assert main(tinyrun.arguments(straight.parent, **{**SETTINGS, "output_dir": str(out), **change})) == 0
    assert_same(straight / f"checkpoint-{TOTAL}", out / f"checkpoint-{TOTAL}")


def test_a_run_of_relative_paths_is_found_from_every_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other folder holds a model and rows of the same names."""
    home, other = tinyrun.prepare(tmp_path / "home"), tinyrun.prepare(tmp_path / "other", rows=30)
    changes = {"training__scheduler": "constant", "training__save_steps": 2, "training__threads": 1}
    words = tinyrun.arguments(Path(), data__validation__size=4, **changes)
    monkeypatch.chdir(home)
    assert main(words) == 0
    config = home / "run" / "resolved_config.toml"
    for name in ("base", "rows.jsonl", "run"):
        assert f'"{home / name}"' in config.read_text()

    longer = ["--resume", "--set", "training.max_train_steps=6"]
    monkeypatch.chdir(other)
    assert main(["bench", "../home/run", "--samples", "0"]) == 0
    assert main(["merge", "../home/run"]) == 0
    assert main(["replay", "../home/run", "--steps", "2"]) == 0
    capsys.readouterr()
    assert main(["train", "--preset", "../home/run/resolved_config.toml", *longer]) == 0
    assert f"resumed from {home / 'run' / 'checkpoint-4'}" in capsys.readouterr().err
    assert not (other / "run").exists()

    # the same words go on in the folder where it began, with what this version or an older one recorded
    monkeypatch.chdir(home)
    for steps in (8, 10):
        capsys.readouterr()
        assert main([*words, "--resume", "--set", f"training.max_train_steps={steps}"]) == 0
        assert f"resumed from run/checkpoint-{steps - 2}" in capsys.readouterr().err
        assert f'"{home / "base"}"' in config.read_text()
        config.write_text(config.read_text().replace(f"{home}/", ""))
