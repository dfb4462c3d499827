"""The command ``train``: its modes, the flags that exclude each other, and what it says before anything slow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tinyrun

from eulerforge.cli import train_command
from eulerforge.cli.main import main


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinyrun.prepare(tmp_path_factory.mktemp("prepared"))


def words(prepared: Path, tmp_path: Path, *more: str, **changes: Any) -> list[str]:
    return [*tinyrun.arguments(prepared, **{"output_dir": str(tmp_path / "run"), **changes}), *more]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--validate-only", "--preflight"], "--validate-only and --preflight exclude each other"),
        (["--preflight", "--print-config"], "--preflight and --print-config exclude each other"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--resume", "--preflight"], "--resume does nothing with --preflight"),
        (["--overwrite", "--validate-only"], "--overwrite does nothing with --validate-only"),
        (["--debug-every", "5"], "--debug-every does nothing without --debug"),
        (["--debug", "--debug-every", "5", "--preflight"], "--debug-every does nothing with --preflight"),
        (["--debug-trainable-names", "--validate-only"], "--debug-trainable-names does nothing with --validate-only"),
        (["--debug-trainable-names", "--print-config"], "--debug-trainable-names does nothing with --print-config"),
        (["--debug", "--debug-every", "0"], "0 is less than 1"),
        (["--debug", "--debug-every", "x"], "'x' is not a whole number"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(words(prepared, tmp_path, *flags)) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["./nope", "../nope", "/nope/model", "~/nope", "./nope.gguf"])
def test_a_model_that_can_only_be_here_and_is_not_is_refused_without_loading(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(words(prepared, tmp_path, "--validate-only", model_name=name)) == 2
    what = "file" if name.endswith("gguf") else "model folder"
    assert f"error: --set: model_name: there is no {what} {name}\n" in capsys.readouterr().err
    (tmp_path / "nope").mkdir()
    assert main(words(prepared, tmp_path, "--validate-only", model_name="./nope")) == 0


def test_validate_only_says_so_and_touches_nothing(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(prepared, tmp_path, "--validate-only")) == 0
    assert capsys.readouterr().out == "run: the configuration is valid\n"
    assert main(words(prepared, tmp_path, "--validate-only", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["data"] == {"preset": "run", "valid": True}
    assert not (tmp_path / "run").exists()


def test_all_that_is_wrong_is_said_at_once_with_its_source(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        "data__path": "absent.jsonl",
        "training__phases": [{"step": 0, "trainable": ["lroa"]}, {"step": 0, "trainable": ["lora"]}],
    }
    assert main(words(prepared, tmp_path, "--validate-only", **wrong)) == 2
    shown = capsys.readouterr().err
    for part in ("there is no file absent.jsonl", "there is no group 'lroa'", "did you mean lora?", "must increase"):
        assert part in shown
    assert shown.count("error: --set: ") == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "gpu"}, "device: 'gpu' is no device"),
        ({"device": "cuda:first"}, "device: 'cuda:first' is no device"),
        ({"data__schema": {"promt": "question"}}, "data.schema.promt: promt is no row key"),
        ({"data__date": "tomorrow"}, "data.date: 'tomorrow' is no day"),
    ],
)
def test_what_needs_no_model_is_checked_without_one(
    prepared: Path, tmp_path: Path, change: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(prepared, tmp_path, "--validate-only", **change)) == 2
    assert said in capsys.readouterr().err


def test_a_file_of_another_format_is_refused_without_a_model(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.csv").write_text("prompt,response\n")
    assert main(words(prepared, tmp_path, "--validate-only", data__path=str(tmp_path / "rows.csv"))) == 2
    assert ".csv files are not read" in capsys.readouterr().err


def test_print_config_is_a_preset_that_gives_the_same_configuration(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(prepared, tmp_path, "--print-config")) == 0
    text = capsys.readouterr().out
    assert "lr = 0.02" in text
    assert "# --set" in text
    (tmp_path / "same.toml").write_text(text)
    assert main(["train", "--preset", str(tmp_path / "same.toml"), "--print-config", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["data"]
    assert main(words(prepared, tmp_path, "--print-config", "--json")) == 0
    first = json.loads(capsys.readouterr().out)["data"]
    assert again["config"] == first["config"]
    assert first["provenance"]["training.lr"] == "--set"
    assert first["provenance"]["training.eps"] == "default"


def test_training_without_data_is_refused_and_preflight_is_not(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(prepared, tmp_path, data__path=None)) == 2
    assert "error: data.path: no training data is named" in capsys.readouterr().err
    assert main(words(prepared, tmp_path, "--preflight", data__path=None)) == 0
    assert "made-up tokens" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_preflight_lists_names_for_people_and_for_machines(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.0.mlp.gate_proj.lora_A"
    assert main(words(prepared, tmp_path, "--preflight")) == 0
    assert name not in capsys.readouterr().out
    assert main(words(prepared, tmp_path, "--preflight", "--debug-trainable-names")) == 0
    assert f"  {name}  (4, 32)  float32" in capsys.readouterr().out
    assert main(words(prepared, tmp_path, "--preflight", "--debug-trainable-names", "--json")) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert any(name in line for line in data["trainable"])
    assert data["groups"]["lora"]["tensors"] == 18


def test_a_run_gives_its_summary_on_stdout_and_all_else_on_stderr(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(prepared, tmp_path, "--json", training__max_train_steps=2)) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)["data"]
    assert (data["steps"], data["output_dir"]) == (2, str(tmp_path / "run"))
    assert data["held_out"] is None
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == data
    assert "step 2/2  loss" in captured.err
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "resolved_config.toml", "metrics.jsonl", "receipt.json", "checkpoint-2", "final",
    }  # fmt: skip


def test_without_steps_or_epochs_it_trains_one_epoch_and_says_so(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(prepared, tmp_path, training__max_train_steps=None, training__batch_size=5)) == 0
    shown = capsys.readouterr().err
    assert "training for 1 epoch" in shown
    assert "step 5/5" in shown  # 24 rows, 5 a step


def test_samples_without_held_out_rows_are_warned_of_and_a_sample_shows_the_question_alone(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"evaluation__samples": 1, "evaluation__max_new_tokens": 2, "training__max_train_steps": 1}
    assert main(words(prepared, tmp_path, **changes, training__val_steps=5)) == 0
    captured = capsys.readouterr()
    assert "warning: training.val_steps does nothing without held-out rows" in captured.err
    assert "warning: evaluation.samples does nothing without held-out rows" in captured.err
    assert "prompt:" not in captured.out
    changes |= {"data__validation__size": 3, "data__system_prompt": "Be kind.", "evaluation__prompts": ["Who?"]}
    assert main(words(prepared, tmp_path, "--overwrite", **changes)) == 0
    lines = capsys.readouterr().out.splitlines()
    prompts = [line for line in lines if line.startswith("prompt: ")]
    assert prompts[0] == "prompt: Who?"
    assert prompts[1].startswith(("prompt: What is", "prompt: Why?", "prompt: Who builds?"))
    assert not any("Be kind." in line or "assistant" in line for line in lines)


def test_out_of_memory_is_exit_1_with_the_run_s_own_numbers(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from eulerforge.training import session

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(session, "train_loop", full)
    assert main(words(prepared, tmp_path)) == 1
    shown = capsys.readouterr().err
    assert "error: out of memory: CUDA out of memory" in shown
    assert "model.load_precision.mode=int4 (now fp32)" in shown
    assert "training.tokens_per_micro_batch=128 (now 256; the result stays the same)" in shown
    assert "injection.lora_r (now 4)" in shown


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run_and_names_the_rows(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    from eulerforge.training import loop

    real = loop.label_token_loss

    def broken(model: Any, batch: Any) -> Any:
        total, count = real(model, batch)
        if part == "loss":
            return total * float("nan"), count
        total.register_hook(lambda gradient: gradient * float("inf"))
        return total, count

    monkeypatch.setattr(loop, "label_token_loss", broken)
    assert main(words(prepared, tmp_path, training__save_steps=1)) == 1
    shown = capsys.readouterr().err
    assert f"error: the {part} of step 1 is" in shown
    assert f"{prepared / 'rows.jsonl'}:" in shown
    assert not list((tmp_path / "run").glob("checkpoint-*")), "nothing was updated, nothing is saved"


def test_torchrun_is_refused_before_the_folder_is_made(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words(prepared, tmp_path)) == 2
    assert "WORLD_SIZE is 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_no_cuda_is_exit_4_with_the_way_out(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(words(prepared, tmp_path, device="cuda:0")) == 4
    shown = capsys.readouterr().err
    assert "error: device: cuda:0 is asked for, but this machine has no CUDA device" in shown
    assert "hint: --set device=cpu" in shown


def test_the_command_to_resume_with_is_the_one_that_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["/bin/eulerforge", "train", "--preset", "my preset.toml", "--overwrite", "--set", "training.lr=2e-5"]
    monkeypatch.setattr("sys.argv", typed)
    assert train_command._resume_command() == (
        "eulerforge train --preset 'my preset.toml' --set training.lr=2e-5 --resume"
    )
    monkeypatch.setattr("sys.argv", ["eulerforge", "train", "--resume"])
    assert train_command._resume_command() == "eulerforge train --resume"
