"""The shell around the commands: exit codes, the one-line form, and that light commands stay light."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys

import pytest

from eulerforge.cli import main as shell
from eulerforge.errors import DeviceError, EulerForgeError, PluginError, RunError, Stopped, UsageError

HEAVY = ("torch", "transformers", "numpy", "bitsandbytes", "rich", "tokenizers")
VALIDATE = ["train", "--preset", "llama3.2_1b_dense_lora_sft", "--validate-only"]
LIGHT = [(["--help"], 0.25), (["plugins", "list"], 0.5), (["presets", "list"], 0.6), (VALIDATE, 0.6)]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("merge", ["~/run", "--output=~/a"]),
        ("export", ["~/run", "--format=peft", "--output=~/a"]),
        ("bench", ["~/run"]),
        ("replay", ["~/run", "--steps=1"]),
    ],
)
def test_a_folder_on_the_command_line_may_be_below_the_home(
    command: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    args = shell.command_parser(command).parse_args(words)
    assert str(args.run) == "/home/somebody/run"
    assert str(getattr(args, "output", "/home/somebody/a")) == "/home/somebody/a"


@pytest.mark.parametrize(("arguments", "seconds"), LIGHT)
def test_light_commands_import_nothing_heavy_and_answer_at_once(arguments: list[str], seconds: float) -> None:
    code = (
        f"import sys; sys.argv[1:] = {arguments!r}\n"
        "from eulerforge.cli.main import main\n"
        "try:\n    code = main()\nexcept SystemExit as stop:\n    code = stop.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules], 'CODE', code, file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.splitlines()[-1] == "HEAVY [] CODE 0"
    assert ran.stdout or ran.stderr.count("\n") > 1
    # CPU seconds, which other processes do not lengthen much, and the best of up to ten tries: a shared machine is slow
    # now and then, an import of torch is slow every time
    best = math.inf
    for _ in range(10):
        best = min(best, cpu_seconds([sys.executable, "-m", "eulerforge", *arguments]))
        if best < seconds:
            return
    pytest.fail(f"{arguments} took {best:.3f} s of CPU, the bound is {seconds} s")


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one finished child process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("bad", hint="mend it", key="training.lr", source="p.toml:3"), 2),
        (PluginError("bad", hint="mend it", key="training.lr", source="p.toml:3"), 3),
        (DeviceError("bad", hint="mend it", key="training.lr", source="p.toml:3"), 4),
        (RunError("bad", hint="mend it", key="training.lr", source="p.toml:3"), 1),
    ],
)
def test_errors_are_a_line_and_a_hint_with_their_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: EulerForgeError, code: int
) -> None:
    def fail(_: list[str]) -> int:
        raise error

    monkeypatch.setattr(shell, "_dispatch", fail)
    assert shell.main([]) == code
    assert capsys.readouterr().err == "error: p.toml:3: training.lr: bad\nhint: mend it\n"
    assert shell.main(["--json"]) == code
    body = json.loads(capsys.readouterr().out)
    assert body == {
        "schema": 1,
        "ok": False,
        "problems": [{"message": "bad", "hint": "mend it", "key": "training.lr", "source": "p.toml:3"}],
    }


def test_a_signal_gives_128_plus_its_number() -> None:
    assert Stopped("stopped", signal_number=2).exit_code == 130
    assert Stopped("stopped", signal_number=15).exit_code == 143


def test_an_unexpected_exception_is_one_line_and_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: list[str]) -> int:
        raise KeyError("surprise")

    monkeypatch.setattr(shell, "_dispatch", fail)
    assert shell.main([]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: KeyError: 'surprise'\nhint: --debug")
    assert "Traceback" not in shown
    shell.main(["--debug"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["trian"], "did you mean eulerforge train?"),
        (["train"], "no preset is given"),
        (["train", "--preset", "quikstart"], "did you mean quickstart?"),
        (["train", "--prest", "x"], "did you mean --preset?"),
        (["train", "--frobnicate=1"], "hint: eulerforge train --help"),
        (["train", "quickstart"], "did you mean --preset quickstart?"),
        (["train", "--set", "training.lr", "1e-4"], "did you mean --set training.lr=1e-4?"),
        (["train", "--set=training.lr", "1e-4"], "did you mean --set training.lr=1e-4?"),
        (["train", "--set", "training.lr", "=", "1e-4"], "did you mean --set training.lr=1e-4?"),
        (["train", "training.lr=1e-4"], "did you mean --set training.lr=1e-4?"),
        (["train", "--set", "seed=1", "training.lr=1e-4"], "did you mean --set training.lr=1e-4?"),
        (["train", "--set", "seed=1", "quickstart"], "did you mean --preset quickstart?"),
        (["data", "preview", "--set", "data.max_length", "64"], "did you mean --set data.max_length=64?"),
        (["--preset", "quickstart"], "options come after the command: eulerforge COMMAND --preset"),
        (["env", "--jsn"], "did you mean --json?"),
        (["presets", "show", "mixtral"], "give the whole name: mixtral"),
        (["presets", "show", "zzz"], "presets list shows the bundled ones"),
        (["presets"], "required"),
        (["train", "--preset", "quickstart", "--set", "training.lr"], "KEY=VALUE"),
    ],
)
def test_usage_errors_are_exit_2_with_a_hint(
    capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    assert shell.main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert part in shown
    assert "hint: " in shown
    assert "Traceback" not in shown


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in shell.COMMANDS:
        assert shell.command_parser(name).format_help().startswith(f"usage: eulerforge {name}")


def test_a_closed_pipe_does_no_harm() -> None:
    ran = subprocess.run(
        f"{sys.executable} -m eulerforge presets show quickstart | head -n 1",
        shell=True, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Traceback" not in ran.stderr
    assert "Exception" not in ran.stderr
