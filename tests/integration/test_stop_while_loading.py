"""A signal before the first step: its own code, one line, nothing written, and the same command starts anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tinyrun

from eulerforge.cli.main import AGAIN, main
from eulerforge.config.atomic import staged_folder
from eulerforge.export import merged, rundir
from eulerforge.training import assemble, diskroom, session

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
SHORT: dict[str, Any] = {"training__max_train_steps": 1, "training__threads": 1}
IMPORTING = """
import os, sys
module, number, *sys.argv[1:] = sys.argv[1:]
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), int(number))
sys.meta_path.insert(0, Watch())
from eulerforge.cli.main import entry
entry()
"""


KILLED = """
import os, signal, sys
from eulerforge.cli.main import main
from eulerforge.export import merged
merged.verify_loads = lambda staging, **_: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinyrun.prepare(tmp_path_factory.mktemp("loading"))


def words(folder: Path, out: Path) -> list[str]:
    return tinyrun.arguments(folder, output_dir=str(out), **SHORT)


def said(name: str) -> list[str]:
    return [f"error: stopped by {name} while loading: nothing was written", "hint: the same command starts anew"]


@pytest.mark.parametrize(
    ("module", "number", "code"),
    [
        ("torch._tensor", *SIGNALS[1]),
        ("torch.nn.functional", *SIGNALS[0]),
        ("transformers.modeling_utils", *SIGNALS[2]),
    ],
)
def test_a_signal_during_an_import(
    folder: Path, tmp_path: Path, module: str, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", IMPORTING, module, str(int(number)), *words(folder, out)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr.splitlines()) == (code, "", said(number.name))
    assert not out.exists()


MOMENTS: dict[str, tuple[Any, str]] = {
    "when the rows are tokenized": (assemble, "build_dataset"),
    "when the model is loaded": (assemble, "load_model"),
    "when the adapters are put in": (assemble, "inject_and_plan"),
    "when the optimizer is made": (session, "make_optimizer"),
    "when the base's hash is awaited": (session.BaseHash, "result"),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_while_loading(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
    number: signal.Signals,
    code: int,
) -> None:
    (room, name), out = MOMENTS[moment], tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(room, name, lambda *_, **__: os.kill(os.getpid(), number))
        assert main(words(folder, out)) == code
    assert capsys.readouterr().err.splitlines()[-2:] == said(number.name)
    assert [path.name for path in out.iterdir()] == [".lock"]
    if number == signal.SIGTERM:
        assert main(words(folder, out)) == 0, "the folder is neither used nor locked"


def test_a_run_that_was_to_be_overwritten_is_still_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert main(words(folder, out)) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    with monkeypatch.context() as patched:
        patched.setattr(session.BaseHash, "result", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main([*words(folder, out), "--overwrite"]) == 143
    assert {path: path.read_bytes() for path in before} == before


def test_a_signal_when_the_folder_is_opened_waits_for_the_first_edge(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, real = tmp_path / "run", session.identity

    def signalled(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(session, "identity", signalled)
        assert main(words(folder, out)) == 143
    assert "error: stopped at step 0 of 1; checkpoint-0 is saved" in capsys.readouterr().err
    assert main([*words(folder, out), "--resume"]) == 0


def test_a_merge_that_is_stopped_leaves_nothing_half_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, target = tmp_path / "run", tmp_path / "exports" / "merged"
    assert main(words(folder, out)) == 0
    capsys.readouterr()
    staged = []

    def signalled(staging: Path, **_: Any) -> None:
        staged.extend(staging.glob("*.safetensors"))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(merged, "verify_loads", signalled)
    assert main(["merge", str(out), "--output", str(target)]) == 143
    assert capsys.readouterr().err.splitlines()[-2:] == ["error: stopped by SIGTERM", f"hint: {AGAIN}"]
    assert staged, "it had begun to write"
    assert list(target.parent.iterdir()) == []


def test_a_merge_that_is_killed_is_swept_by_the_next_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(words(folder, out)) == 0
    before = {path.name for path in out.iterdir()}
    assert subprocess.run([sys.executable, "-c", KILLED, "merge", str(out)], check=False).returncode == -signal.SIGKILL
    (left,) = (path for path in out.glob(".staging-merged-*") if path.is_dir())
    assert any(left.glob("*.safetensors"))
    capsys.readouterr()
    assert main(["merge", str(out)]) == 0
    assert f"removed {left}, which an interrupted export left" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == before | {"merged"}


def test_a_run_leaves_the_folder_of_a_merge_that_is_alive(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(words(folder, out)) == 0
    with staged_folder(out / "merged") as staging:
        (staging / "model.safetensors").write_bytes(b"half")
        assert main([*words(folder, out), "--overwrite"]) == 0
        assert (staging / "model.safetensors").read_bytes() == b"half"
    assert "removed" not in capsys.readouterr().err


@pytest.mark.parametrize(("command", "more"), [("merge", []), ("export", ["--format", "peft"])])
def test_a_disk_without_room_is_known_before_the_base_is_loaded(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    more: list[str],
) -> None:
    out, target = tmp_path / "run", tmp_path / "exports" / "model"
    assert main(words(folder, out)) == 0
    capsys.readouterr()
    monkeypatch.setattr(rundir, "load_model", None)
    monkeypatch.setattr(diskroom.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    assert main([command, str(out), *more, "--output", str(target)]) == 1
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith(f"error: {target} was not written: ")
    assert error.endswith("(4,096 bytes) are free")
    assert hint.startswith("hint: make room there, or take a folder on another disk with --output")
    assert not target.parent.exists()


def test_an_overwritten_run_s_exports_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(words(folder, out)) == 0
    assert main(["merge", str(out)]) == 0
    before = {path: path.read_bytes() for path in (out / "merged").iterdir()}
    capsys.readouterr()
    assert main([*words(folder, out), "--overwrite"]) == 0
    warning = f"warning: {out / 'merged'} stays, and is an export of the run that was overwritten"
    assert capsys.readouterr().err.count(warning) == 1
    assert {path: path.read_bytes() for path in (out / "merged").iterdir()} == before
    assert main(["merge", str(out)]) == 2
    assert main(["merge", str(out), "--overwrite"]) == 0
