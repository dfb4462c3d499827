"""``data preview`` from the command line: marks, colour, JSON, and errors that name the row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_tokenizer

from eulerforge.cli import data_command
from eulerforge.cli.main import main


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command's arguments for a file of two rows; the tokenizer needs no model folder."""
    monkeypatch.setattr("eulerforge.models.load.load_tokenizer", lambda run: tiny_tokenizer())
    monkeypatch.setenv("EULERFORGE_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "one", "response": "two"}\n{"prompt": "three", "response": "four"}\n')
    preset = "llama3.2_1b_dense_lora_sft"
    return ["data", "preview", "--preset", preset, "--set", "data.format=raw", "--set", f"data.path={rows}"]


def test_trained_text_stands_in_brackets(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n⟦two<|im_end|>⟧" in out
    assert "rows.jsonl:1: " in out
    assert "three" not in out
    assert "2 rows read" in out
    assert "\x1b" not in out


def test_colour_on_a_terminal(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eulerforge.cli.output.colour_wanted", lambda: True)
    assert main([*command, "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{data_command.TRAINED_START}two<|im_end|>{data_command.TRAINED_END}" in out
    assert "⟦" not in out


def test_json(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["schema"], body["ok"]) == (1, True)
    first = body["data"]["rows"][0]
    assert [run["text"] for run in first["runs"] if run["trained"]] == ["two<|im_end|>"]
    assert first["trained_tokens"] == len("two") + 1
    assert body["data"]["report"]["train_rows"] == 2


def test_held_out_rows(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--validation"]) == 2
    assert "error: data.validation: nothing is held out" in capsys.readouterr().err
    assert main([*command, "--validation", "--set", "data.validation.size=1"]) == 0
    assert capsys.readouterr().out.count("trained\n") == 1


def test_rows_that_training_refuses_are_shown_with_a_warning(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one", "response": "one two three four"}\n' * 3)
    assert main([*command, "--set", "data.max_length=30", "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["data"]["rows"]) == 3
    assert "data.max_length: train refuses these rows: cut answer: 3 of 3 rows" in err
    assert "hint: --set data.max_length=" in err
    assert main(command) == 0
    assert "train refuses" not in capsys.readouterr().err


def test_bad_rows_are_named(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one", "response": "two"}\n\n{"prompt": 1, "response": "x"}\n')
    assert main(command) == 2
    error = f"error: {tmp_path}/rows.jsonl:3: prompt: must be a string, not a number"
    assert capsys.readouterr().err.splitlines() == [error, "hint: mend that row, or delete it"]
    assert main([*command, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["problems"][0]["source"] == f"{tmp_path}/rows.jsonl:3"


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_rows_must_be_a_count(command: list[str], capsys: pytest.CaptureFixture[str], count: str) -> None:
    assert main([*command, "--rows", count]) == 2
    assert "--rows" in capsys.readouterr().err


def test_brackets_that_the_stream_can_write() -> None:
    class Stream:
        encoding = "latin-1"

    assert data_command._brackets(Stream()) == ("[[", "]]")  # type: ignore[arg-type]
