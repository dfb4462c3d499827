"""The claims of docs/security.md that no other test holds."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tinyrun

from eulerforge.cli.main import main
from eulerforge.config.location import resolve_location
from eulerforge.errors import UsageError

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "eulerforge").rglob("*.py"), *(ROOT / "plugins").glob("*/src/**/*.py")])
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
Shown = pytest.CaptureFixture[str]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_of_ours_reads_or_writes_pickles_or_evaluates_text(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {name.name.partition(".")[0] for name in node.names} & PICKLING
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in PICKLING
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"torch.load", "torch.save", "eval", "exec", "os.system", "yaml.load", "np.save"}
            for keyword in node.keywords:
                if keyword.arg in ("allow_pickle", "shell"):
                    assert isinstance(keyword.value, ast.Constant)
                    assert keyword.value.value is False
                if called.endswith("from_pretrained") and keyword.arg == "trust_remote_code":
                    assert ast.unparse(keyword.value) in {
                        "run.model.trust_remote_code",
                        "trust_remote_code",
                        "remote_code",
                        "trust",
                    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinyrun.prepare(tmp_path_factory.mktemp("security"), rows=8)


def test_a_run_and_its_merge_unpickle_nothing_and_open_no_connection(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was read, or a connection opened")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    out = tmp_path / "run"
    words = tinyrun.arguments(prepared, output_dir=str(out), training__max_train_steps=2, training__save_steps=1)
    assert main(words) == 0
    assert main(["merge", str(out)]) == 0
    assert main([*words, "--resume"]) == 0
    suffixes = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert not suffixes & {".bin", ".pt", ".pth", ".pkl", ".pickle", ".npy", ".npz"}


def test_a_hub_name_offline_is_one_error_and_no_connection(capsys: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert main(["train", "--set", "model_name=nobody/nothing", "--preflight"]) == 2
    assert "error: model_name: nobody/nothing" in capsys.readouterr().err


def test_code_of_a_model_runs_only_when_the_preset_says_so_and_is_then_recorded(
    prepared: Path, tmp_path: Path, capsys: Shown
) -> None:
    words = tinyrun.arguments(prepared, output_dir=str(tmp_path / "a"), training__max_train_steps=1)
    assert main(words) == 0
    assert json.loads((tmp_path / "a" / "receipt.json").read_text())["base"]["code_of_its_own"] is False
    capsys.readouterr()
    trusting = [*words, "--set", "model.trust_remote_code=true", "--set", f"output_dir={tmp_path / 'b'}"]
    assert main(trusting) == 0
    assert "warning: model.trust_remote_code is on" in capsys.readouterr().err
    assert json.loads((tmp_path / "b" / "receipt.json").read_text())["base"]["code_of_its_own"] is True


def test_a_model_folder_with_code_does_not_run_it(prepared: Path, tmp_path: Path, capsys: Shown) -> None:
    import damage

    base = damage.copy(prepared / "base", tmp_path / "base")
    mark = tmp_path / "ran"
    (base / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: ...\n", encoding="utf-8")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    main([*tinyrun.arguments(prepared, model_name=str(base), output_dir=str(tmp_path / "run")), "--preflight"])
    assert "Traceback" not in capsys.readouterr().err
    assert not mark.exists()


def test_a_chat_template_cannot_leave_its_sandbox(prepared: Path, tmp_path: Path, capsys: Shown) -> None:
    import damage

    base = damage.copy(prepared / "base", tmp_path / "base")
    mark = tmp_path / "ran"
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    (base / "chat_template.jinja").write_text(escape + f"{{# {mark} #}}", encoding="utf-8")
    words = tinyrun.arguments(prepared, model_name=str(base), output_dir=str(tmp_path / "run"))
    assert main([*words, "--preflight"]) == 2
    assert "the chat template refuses this row" in capsys.readouterr().err


def test_a_run_of_local_files_opens_no_connection_online(prepared: Path, tmp_path: Path) -> None:
    code = """
import socket, sys
def refuse(*_, **__):
    print("a connection was opened", file=sys.stderr)
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from eulerforge.cli.main import main
code = main(sys.argv[1:])
from huggingface_hub.constants import HF_HUB_OFFLINE
assert not HF_HUB_OFFLINE
try:
    socket.create_connection(("127.0.0.1", 1))  # that the trap is set
except OSError as error:
    print(error)
sys.exit(code)
"""
    words = tinyrun.arguments(prepared, output_dir=str(tmp_path / "run"), training__max_train_steps=1)
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environ, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a connection was opened") == 1, done.stderr
    assert "no network here" in done.stdout


@pytest.mark.parametrize("text", ["pkg://eulerforge/../pyproject.toml", "pkg://eulerforge//etc/passwd", "pkg://../x/y"])
def test_a_package_location_stays_in_its_package(text: str) -> None:
    with pytest.raises(UsageError):
        resolve_location(text)


def test_data_cannot_steer_the_terminal(prepared: Path, tmp_path: Path, capsys: Shown) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "\\u001b[2Jhi\\u009b31m", "response": "\\u202eevil"}\n', encoding="utf-8")
    words = ["data", "preview", "--set", f"model_name={prepared / 'base'}", "--set", f"data.path={rows}"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert not re.search("[\x1b\x9b\u202e]", shown.out + shown.err)
