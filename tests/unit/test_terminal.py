"""Text that would steer a terminal, spelled out: in errors, tables, JSON, presets and samples."""

from __future__ import annotations

import json
import tomllib

import pytest

from eulerforge.cli import output
from eulerforge.config.emit import toml_text
from eulerforge.errors import LONGEST_LINE, Problem
from eulerforge.terminal import harmless, harmless_json, one_line

STEERING = [
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\x9b31m",
    "\r",
    "\x08",
    "\x7f",
    "\u202e",
    "\u2066",
    "\u2028",
    "\u200f",
    "\ud800",
]


@pytest.mark.parametrize("text", STEERING)
def test_nothing_that_steers_comes_out_raw(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert harmless(text).isprintable()
    assert harmless(harmless(text)) == harmless(text)
    for line in Problem(message=text, hint=text, key=text, source=text).lines():
        assert line.isprintable()
    output.say(text)
    output.tell(text)
    output.warn(text)
    output.print_table(["name"], [[text]])
    output.emit_json({"text": text, text: 1})
    output.emit_json_problems([Problem(message=text)])
    shown = capsys.readouterr()
    assert all(line.isprintable() for line in (shown.out + shown.err).splitlines())
    assert json.loads(shown.out.splitlines()[-2])["data"]["text"] == text


def test_json_has_no_number_that_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit_json({"loss": float("nan"), "rows": [(1.5, float("inf"))], "step": 3})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["data"] == {
        "loss": None,
        "rows": [[1.5, None]],
        "step": 3,
    }


def test_what_people_write_stays() -> None:
    text = "naïve 日本語 🙂 ⟦x⟧\n\ttabbed — “quoted”"
    assert harmless(text) == text
    assert one_line("a\nb\tc") == "a\\nb\\tc"


def test_a_line_has_an_end() -> None:
    (line,) = Problem(message="x" * 10**6 + "end").lines()
    assert len(line) < LONGEST_LINE + 20
    assert line.endswith("end")
    assert "xxx ... xxx" in line


@pytest.mark.parametrize("text", [text for text in STEERING if text != "\ud800"])
def test_json_and_presets_keep_their_meaning(text: str) -> None:
    tree = {"a": text, f"key {text}": [text]}
    written = harmless_json(json.dumps(tree, ensure_ascii=False))
    assert json.loads(written) == tree
    assert written.isprintable()
    preset = toml_text(tree)
    assert tomllib.loads(preset) == tree
    assert all(line.isprintable() for line in preset.split("\n"))
