"""What an installed plugin does by accident harms nobody else: it is a row in a table, or one line that names it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinyrun
from pluginforge import Forge

from eulerforge.cli.main import main
from eulerforge.plugins import registry as registry_module

Shown = pytest.CaptureFixture[str]
PRESET = """
@hookimpl
def eulerforge_presets():
    return [PresetSpec(name="forged", package={package!r}, file={file!r})]
"""
SECRET = 'password = "hunter2"\n'


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinyrun.prepare(tmp_path_factory.mktemp("plugins"), rows=8)


@pytest.fixture
def forge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Forge]:
    """A Forge whose modules are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield Forge(folder)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def shipped(forge: Forge, tmp_path: Path) -> Path:
    """The folder of a package that a plugin's preset lies in, and a secret outside of it."""
    (tmp_path / "secret.toml").write_text(SECRET, encoding="utf-8")
    folder = forge.folder / "shipped"
    (folder / "presets").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "presets" / "good.toml").write_text('model_name = "x"\n', encoding="utf-8")
    return folder


def presets(capsys: Shown, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["presets", *words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize(
    ("package", "file"),
    [
        ("shipped", "../../secret.toml"),
        ("shipped", "presets/../../../secret.toml"),
        ("shipped", "..\\..\\secret.toml"),
        ("shipped", "/etc/hostname"),
        ("shipped", "\\\\server\\share"),
        ("../..", "secret.toml"),
        ("shipped/../..", "secret.toml"),
        ("", "etc/hostname"),
        ("shipped", "presets/link.toml"),
        ("shipped", "linked/secret.toml"),
        ("shipped", "presets/absent.toml"),
        ("shipped", "presets"),
        ("not_there", "secret.toml"),
    ],
)
def test_a_plugin_s_preset_stays_in_its_package_and_hides_no_other(
    forge: Forge, shipped: Path, tmp_path: Path, capsys: Shown, package: str, file: str
) -> None:
    (shipped / "presets" / "link.toml").symlink_to(tmp_path / "secret.toml")
    (shipped / "linked").symlink_to(tmp_path)
    forge.plugin("forged_preset", PRESET.format(package=package, file=file))
    code, out, err = presets(capsys, "list")
    assert code == 0
    assert "quickstart" in out
    assert "forged" not in out
    code, out, err = presets(capsys, "show", "forged")
    assert code != 0
    assert out == ""
    assert re.search("^error: .*forged", err)
    assert "hint: " in err
    assert "hunter2" not in err + out
    assert "Traceback" not in err
    assert presets(capsys, "show", "quickstart")[0] == 0


def test_a_package_that_is_linked_file_by_file_works(
    forge: Forge, shipped: Path, tmp_path: Path, capsys: Shown
) -> None:
    store = tmp_path / "store"
    shipped.rename(store)
    (shipped / "presets").mkdir(parents=True)
    for name in ("__init__.py", "presets/good.toml"):
        (shipped / name).symlink_to(store / name)
    forge.plugin("forged_preset", PRESET.format(package="shipped", file="presets/good.toml"))
    assert presets(capsys, "show", "forged")[:2] == (0, 'model_name = "x"\n')


def test_a_plugin_s_preset_never_takes_the_place_of_a_bundled_one(forge: Forge, shipped: Path, capsys: Shown) -> None:
    (shipped / "presets" / "quickstart.toml").write_text('model_name = "evil"\n', encoding="utf-8")
    source = PRESET.format(package="shipped", file="presets/quickstart.toml")
    forge.plugin(
        "forged_preset", source.replace('"forged"', '"quickstart"') + source.replace("def eulerforge", "def x_")
    )
    forge.plugin("forged_other", source.replace('"forged"', '"aaa"'), entry="other")
    for name in ("quickstart", "somewhere/quickstart.toml"):
        code, out, _ = presets(capsys, "show", name)
        assert code == 0
        assert "evil" not in out


ODD_NAMES = ("../../evil", "/etc/evil", "a\x1b[2Jb", "a\u202eb", "x" * 5000, "..", "~", "$(touch evil)", "a;b", "%s{0}")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_plugin_s_name_steers_no_terminal_and_becomes_no_path(
    forge: Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown, name: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    forge.plugin("forged_name", "raise RuntimeError('\\x1b[31mred\\u202e')", entry=name, distribution=name)
    before = sorted(tmp_path.rglob("*"))
    for words in (["list"], ["list", "--json"], ["show", name], ["check", name], ["check", name, "--json"]):
        main(["plugins", *words])
        shown = capsys.readouterr()
        assert not re.search("[\x1b\x9b\u202e]", shown.out + shown.err)
        assert "Traceback" not in shown.err
        assert "please report it" not in shown.err
    left = [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts]
    assert [path for path in left if path not in before] == []


BROKEN_METADATA = {
    "no sections": "forged = forged_meta",
    "no value": "[eulerforge.plugins]\nforged\n",
    "an empty value": "[eulerforge.plugins]\nforged =\n",
    "no module": "[eulerforge.plugins]\nforged = ../../evil.py\n",
    "a colon alone": "[eulerforge.plugins]\nforged = :\n",
    "a keyword": "[eulerforge.plugins]\nforged = import os; os._exit(1)\n",
    "an expression": "[eulerforge.plugins]\nforged = os:system('exit')\n",
    "a dunder": "[eulerforge.plugins]\nforged = os:__builtins__\n",
    "control codes": "[eulerforge.plugins]\nforged = \x1b[2J\x00\n",
    "another section's brackets": "[eulerforge.plugins\nforged = forged_meta\n",
    "latin-1": b"[eulerforge.plugins]\nforged = \xe4\xff\n",
    "many entries": "[eulerforge.plugins]\n" + "".join(f"f{number} = absent\n" for number in range(300)),
}


@pytest.mark.parametrize("kind", BROKEN_METADATA)
def test_broken_metadata_is_a_row_or_nothing_and_ours_still_load(forge: Forge, capsys: Shown, kind: str) -> None:
    forge.plugin("forged_meta", entry_points="")
    text = BROKEN_METADATA[kind]
    path = forge.folder / "forged_meta-1.0.dist-info" / "entry_points.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["plugins", "list", "--json"]) == 0
    shown = capsys.readouterr()
    rows = json.loads(shown.out)["data"]["plugins"]
    ours = [row for row in rows if row["distribution"].startswith("eulerforge-")]
    assert len(ours) >= 5
    assert {row["status"] for row in ours} == {"ok"}
    assert all(row["status"] != "ok" for row in rows if row["distribution"] == "forged-meta")
    assert "Traceback" not in shown.err


@pytest.mark.parametrize("code", ["0", "7", "'words'", "None"])
def test_a_plugin_that_exits_in_a_run_does_not_pass_for_a_run_that_is_done(
    prepared: Path, forge: Forge, tmp_path: Path, capsys: Shown, code: str
) -> None:
    forge.strategy("forged_exit", f"sys.exit({code})", imports="import sys\n")
    words = tinyrun.arguments(prepared, output_dir=str(tmp_path / "run"), injection__strategy="forged")
    assert main(words) == 3
    err = capsys.readouterr().err
    assert "error: strategy forged on backbone llama3 raised SystemExit" in err
    assert "Traceback" not in err


def test_a_plugin_that_exits_in_a_step_is_named(prepared: Path, forge: Forge, tmp_path: Path, capsys: Shown) -> None:
    before = "adapter.find_transformer_layers(model)[-1].register_full_backward_hook(leave)"
    forge.strategy("forged_step", before, imports="import sys\n\ndef leave(*_):\n    sys.exit(0)\n")
    words = tinyrun.arguments(prepared, output_dir=str(tmp_path / "run"), injection__strategy="forged")
    assert main(words) == 3
    err = capsys.readouterr().err
    assert "error: plugin forged-step:forged 1.0 raised SystemExit in step 1: 0 (forged_step.target." in err


def test_what_a_plugin_prints_in_a_run_is_not_data(prepared: Path, forge: Forge, tmp_path: Path, capsys: Shown) -> None:
    noisy = (
        "print('noise'); "
        "adapter.find_transformer_layers(model)[0].register_forward_hook(lambda *_: print('noise of a step'))"
    )
    forge.strategy("forged_noise", noisy)
    words = tinyrun.arguments(
        prepared, output_dir=str(tmp_path / "run"), injection__strategy="forged", training__max_train_steps=1
    )
    assert main([*words, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["ok"] is True
    assert "noise of a step" in shown.err


def test_a_plugin_that_leaves_by_another_door_is_an_error_of_the_command(
    forge: Forge, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    def leave(_: object) -> int:
        raise SystemExit(0)

    monkeypatch.setattr("eulerforge.cli.env_command.run", leave)
    assert main(["env"]) == 3
    assert "error: something called sys.exit(0) in the midst of env" in capsys.readouterr().err


def test_a_slow_plugin_is_named(forge: Forge, monkeypatch: pytest.MonkeyPatch, capsys: Shown) -> None:
    monkeypatch.setattr(registry_module, "SLOW_SECONDS", 0.5)
    forge.plugin("forged_slow", "import time\ntime.sleep(0.6)\n")
    assert main(["plugins", "list"]) == 0
    err = capsys.readouterr().err
    assert re.search(r"^warning: plugin forged-slow:forged took \d\.\d s to load\nhint: --no-plugin", err, re.MULTILINE)


def test_a_plugin_that_patches_torch_is_recorded_with_its_version(
    prepared: Path, forge: Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGED", "")
    forge.strategy("forged_patch", "os.environ['FORGED'] = 'patched'", imports="import os\n")
    out = tmp_path / "run"
    words = tinyrun.arguments(prepared, output_dir=str(out), injection__strategy="forged", training__max_train_steps=1)
    assert main(words) == 0
    assert os.environ["FORGED"] == "patched"  # nothing holds a plugin back: the record is what there is
    plugins = json.loads((out / "receipt.json").read_text(encoding="utf-8"))["plugins"]
    assert any("forged-patch" in json.dumps(one) and "1.0" in json.dumps(one) for one in plugins)
