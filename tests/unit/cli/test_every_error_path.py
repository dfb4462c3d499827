"""Every way in which a command fails: its exit code, one ``error:`` line per problem, a hint, no traceback, and JSON.

The walk has two halves: each class of error with its code, and real calls of each command that end in each of them.
"""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import eulerforge
from eulerforge import errors
from eulerforge.cli import main as shell
from eulerforge.cli.main import main
from eulerforge.errors import EulerForgeError, Interrupted, Stopped

CODES = {
    "EulerForgeError": 1,
    "RunError": 1,
    "UsageError": 2,
    "ConfigError": 2,
    "DataError": 2,
    "ModelError": 2,
    "CheckpointError": 2,
    "PluginError": 3,
    "DeviceError": 4,
}
STOPS = {1: 129, 2: 130, 15: 143}


def every_error_class() -> set[type[EulerForgeError]]:
    """All that any module of ours defines."""
    for found in pkgutil.walk_packages(eulerforge.__path__, "eulerforge."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    found_classes: set[type[EulerForgeError]] = {EulerForgeError}
    while more := {child for known in found_classes for child in known.__subclasses__()} - found_classes:
        found_classes |= more
    return {known for known in found_classes if known.__module__.startswith("eulerforge.")}


def test_every_error_class_has_its_documented_code() -> None:
    classes = every_error_class()
    assert {known.__name__ for known in classes} >= {*CODES, "Stopped"}
    for known in classes - {Stopped}:
        assert known.exit_code == next(CODES[base.__name__] for base in known.__mro__ if base.__name__ in CODES)
    for number, code in STOPS.items():
        assert Stopped("stopped", signal_number=number).exit_code == code


def test_no_module_leaves_by_another_door() -> None:
    """``sys.exit`` is for the console script alone; a bare ``raise SystemExit`` would pass the one place by."""
    root = Path(inspect.getfile(eulerforge)).parent
    found = [
        f"{path.relative_to(root)}:{number}"
        for path in root.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.match(r"\s*(sys\.exit|raise SystemExit|os\._exit)\b", line)
    ]
    assert [place.partition(":")[0] for place in found] == ["cli/main.py"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that are wrong in one way each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.toml").write_text("model_name = 'm'\n[training]\nlrr = 1\n")
    (tmp_path / "broken.toml").write_text("model_name = \n")
    (tmp_path / "broken.yml").write_text("a: [1\n")
    (tmp_path / "latin.toml").write_bytes(b"model_name = '\xe9'\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "resolved_config.toml").write_text("model_name = 'm'\n")
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "good.toml").write_text("model_name = 'absent-model'\n[data]\npath = 'good.jsonl'\n")
    return tmp_path


PATHS: list[tuple[str, int]] = [
    ("", 2),
    ("frobnicate", 2),
    ("trian", 2),
    ("--frobnicate", 2),
    ("train", 2),
    ("train --frobnicate", 2),
    ("train --preset absent", 2),
    ("train --preset absent.toml", 2),
    ("train --preset wrong.toml", 2),
    ("train --preset broken.toml", 2),
    ("train --preset broken.yml", 2),
    ("train --preset latin.toml", 2),
    ("train --preset empty", 2),
    ("train --preset good.toml --set training.lr", 2),
    ("train --preset good.toml --set training.lr=fast", 2),
    ("train --preset good.toml --set nothing.at.all=1", 2),
    ("train --preset good.toml --resume --overwrite", 2),
    ("train --preset good.toml --validate-only --preflight", 2),
    ("train --preset good.toml --validate-only --resume", 2),
    ("train --preset good.toml --allow-changed seed", 2),
    ("train --preset good.toml --debug-every 3", 2),
    ("train --preset good.toml --debug-every none", 2),
    ("train --preset good.toml --set data.path=absent.jsonl --validate-only", 2),
    ("train --preset good.toml --set backbone=absent --validate-only", 3),
    ("train --preset good.toml --set injection.strategy=absent", 3),
    ("train --preset good.toml --no-plugin dense_lora --validate-only", 3),
    ("train --preset good.toml --set device=cuda:99", 4),
    ("train --preset good.toml --output-dir used", 2),
    ("train --preset good.toml --output-dir good.jsonl", 2),
    ("train --preset good.toml", 2),
    ("bench", 2),
    ("bench absent", 2),
    ("bench empty", 2),
    ("bench used", 2),
    ("replay used", 2),
    ("replay absent --steps 1", 2),
    ("replay used --steps 1", 2),
    ("replay used --steps none", 2),
    ("merge absent", 2),
    ("merge empty", 2),
    ("merge used", 2),
    ("export used", 2),
    ("export absent --format merged --output x", 2),
    ("export empty --format peft --output x", 2),
    ("export used --format other --output x", 2),
    ("data", 2),
    ("data preview --preset absent", 2),
    ("plugins", 2),
    ("plugins show absent", 3),
    ("presets show absent", 2),
    ("presets frobnicate", 2),
    ("env --frobnicate", 2),
]


@pytest.mark.parametrize(("words", "code"), PATHS, ids=[words or "nothing" for words, _ in PATHS])
def test_each_failure_has_its_code_and_the_one_line_form(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, code: int
) -> None:
    assert main(words.split()) == code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err + shown.out
    if not words:
        return  # the help is the answer
    assert shown.out == ""
    lines = [line for line in shown.err.splitlines() if line.startswith(("error: ", "hint: "))]
    errors_shown = [line for line in lines if line.startswith("error: ")]
    assert errors_shown, shown.err
    assert all(line.removeprefix("error: ").strip() for line in errors_shown)
    assert "please report it" not in shown.err, "a user's mistake is no fault of ours"
    assert shown.err.splitlines()[-1].startswith(("error: ", "hint: "))


WITH_JSON = ("train --", "bench", "replay", "merge", "export")
JSON_PATHS = [(words, code) for words, code in PATHS if words.startswith(WITH_JSON)]


@pytest.mark.parametrize(("words", "code"), JSON_PATHS, ids=[words for words, _ in JSON_PATHS])
def test_each_failure_is_one_json_object_too(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, code: int
) -> None:
    assert main([*words.split(), "--json"]) == code
    envelope = json.loads(capsys.readouterr().out)
    assert (envelope["schema"], envelope["ok"]) == (1, False)
    assert all(problem["message"] for problem in envelope["problems"])


def test_every_command_is_walked() -> None:
    assert set(shell.COMMANDS) <= {words.split()[0] for words, _ in PATHS if words}


class Odd(Exception):
    """What nobody foresaw."""


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let ``eulerforge env`` end in this error."""

    def fails(args: Any) -> int:
        raise error

    monkeypatch.setattr(shell.command_module("env"), "run", fails)


@pytest.mark.parametrize("kind", sorted(every_error_class(), key=lambda kind: kind.__name__))
def test_every_class_is_a_line_a_hint_and_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[EulerForgeError]
) -> None:
    number = {"signal_number": 15} if kind is Stopped else {}
    error = kind("the row\nis \x1b[31mwrong", hint="mend it", **number)
    failing(monkeypatch, error)
    assert main(["env"]) == error.exit_code == {**CODES, "Stopped": STOPS[15]}[kind.__name__]
    shown = capsys.readouterr()
    assert shown.out == ""
    first, second = shown.err.splitlines()
    assert first.startswith("error: the row")
    assert first.endswith("wrong")
    assert "\x1b" not in first
    assert second == "hint: mend it"
    assert main(["env", "--debug"]) == error.exit_code
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2:] == [first, second]


FAULT = "please report it"
PLACE = "--debug shows the place"
UNFORESEEN: list[tuple[BaseException, str, str]] = [
    (Odd("first\nsecond"), "Odd: first", FAULT),
    (Odd(""), "Odd: no message", FAULT),
    (OSError("a library's own words"), "OSError: a library's own words", FAULT),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device", "free some space"),
    (OSError(errno.ENOSPC, "", "runs/a"), "runs/a: No space left on device", "free some space"),
    (OSError(errno.EDQUOT, "", "runs/a"), "runs/a: Disk quota exceeded", "quota"),
    (PermissionError(errno.EACCES, "", "rows.jsonl"), "rows.jsonl: Permission denied", "ls -ld"),
    (FileNotFoundError(errno.ENOENT, "", b"a/b"), "a/b: No such file or directory", "make it"),
    (OSError(errno.EXDEV, "", "a", None, "b"), "a and b: Invalid cross-device link", PLACE),
    (OSError(errno.EROFS, "", "runs"), "runs: Read-only file system", "another folder"),
    (NotADirectoryError(errno.ENOTDIR, "", "a/b"), "a/b: Not a directory", "a part of the path is a file"),
    (IsADirectoryError(errno.EISDIR, "", "a"), "a: Is a directory", "a file is wanted"),
    (OSError(errno.EMFILE, "", "a"), "a: Too many open files", "ulimit -n"),
    (OSError(errno.EIO, "", "a"), "a: Input/output error", "dmesg"),
    (OSError(99999, "odd", "a"), "a: odd", PLACE),
    (MemoryError(), "the machine has no memory left", "smaller"),
    (RecursionError("maximum recursion depth exceeded"), "something is nested deeper than Python can follow", PLACE),
    (UnicodeDecodeError("utf-8", b"a\xe9", 1, 2, "bad"), "a text is not utf-8: byte e9 at offset 1", "UTF-8"),
    (UnicodeEncodeError("ascii", "a\u00e9", 1, 2, "bad"), "the output holds '\\xe9', which ascii", "PYTHONIOENCODING"),
    (ImportError("libcudart.so.12: not found"), "a package cannot be imported: libcudart.so.12: not found", "env"),
]


@pytest.mark.parametrize(("error", "line", "hint"), UNFORESEEN, ids=[line for _, line, _ in UNFORESEEN])
def test_what_nobody_foresaw_is_one_line_and_its_hint_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, line: str, hint: str
) -> None:
    failing(monkeypatch, error)
    assert main(["env"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    first, second = shown.err.splitlines()
    assert first.startswith(f"error: {line}")
    assert second.startswith("hint: ")
    assert hint in second
    assert (hint == FAULT) == (FAULT in second), "what the machine did is no fault of ours"
    assert main(["env", "--debug"]) == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_a_reader_that_went_away_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    failing(monkeypatch, BrokenPipeError(errno.EPIPE, "Broken pipe"))
    with (tmp_path / "out").open("w") as out, monkeypatch.context() as patched:
        patched.setattr("sys.stdout", out)
        assert main(["env"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("interrupt", "name", "code"),
    [(KeyboardInterrupt(), "SIGINT", 130), (Interrupted(15), "SIGTERM", 143), (Interrupted(1), "SIGHUP", 129)],
)
def test_an_interrupt_has_its_signals_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    interrupt: KeyboardInterrupt,
    name: str,
    code: int,
) -> None:
    failing(monkeypatch, interrupt)
    assert main(["env"]) == code
    assert capsys.readouterr().err == f"error: stopped by {name}\nhint: {shell.AGAIN}\n"


def test_every_command_takes_debug() -> None:
    """The hint names it, so it must be there."""
    for words in ("env", "presets list", "presets show x", "plugins list", "plugins show x", "plugins check x"):
        command, *rest = words.split()
        assert shell.command_parser(command).parse_args([*rest, "--debug"]).debug
    for command, rest in (("train", []), ("merge", ["r"]), ("data", ["preview"]), ("bench", ["r"])):
        assert shell.command_parser(command).parse_args([*rest, "--debug"]).debug


@pytest.mark.parametrize("name", [name for name, known in vars(errors).items() if inspect.isclass(known)])
def test_every_class_of_errors_is_in_the_table_here(name: str) -> None:
    assert name in {*CODES, "Stopped", "Problem"} or not issubclass(getattr(errors, name), EulerForgeError)
