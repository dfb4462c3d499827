"""Every file of a checkpoint, spoiled in every way: skipped by a resume and said, refused by merge, never used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import damage
import pytest
import tinyrun

from eulerforge.cli.main import main
from eulerforge.training.rotation import latest_complete

FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
Shown = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after two checkpoints."""
    folder = tinyrun.prepare(tmp_path_factory.mktemp("checkpoints"), rows=8)
    assert main(tinyrun.arguments(folder, training__save_steps=1, training__max_train_steps=2)) == 0
    damage.removed(folder / "run" / "final" / "manifest.json")
    return folder


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder."""
    return damage.copy(prepared / "run", tmp_path / "run")


@pytest.mark.parametrize("spoil", damage.ALL, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_skipped_and_said_and_refused_where_it_is_named(
    run: Path, capsys: Shown, name: str, spoil: Callable[[Path], None]
) -> None:
    assert {path.name for path in (run / "checkpoint-2").iterdir()} == set(FILES)
    spoil(run / "checkpoint-2" / name)
    said: list[str] = []
    newest = latest_complete(run, say=said.append)
    capsys.readouterr()
    code = main(["merge", str(run / "checkpoint-2"), "--output", str(run.parent / "merged")])
    err = capsys.readouterr().err
    assert newest == run / "checkpoint-1"
    assert said[0].startswith("skipped checkpoint-2: ")
    assert name in said[0]
    assert code == 2
    assert name in err.splitlines()[-2] if err.splitlines()[-1].startswith("hint") else name in err
    assert "Traceback" not in err
    assert "please report it" not in err
    assert not (run.parent / "merged").exists()


def test_a_resume_goes_on_from_the_sound_one_and_says_what_it_skipped(prepared: Path, run: Path, capsys: Shown) -> None:
    damage.middle_bit_flipped(run / "checkpoint-2" / "optimizer.safetensors")
    words = tinyrun.arguments(prepared, output_dir=str(run), training__save_steps=1, training__max_train_steps=2)
    assert main([*words, "--resume"]) == 0
    err = capsys.readouterr().err
    assert "skipped checkpoint-2: " in err
    assert "resumed from" in err
    assert "checkpoint-1 at step 1" in err


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/adapter.safetensors", ".."])
def test_a_manifest_cannot_name_what_lies_outside(run: Path, name: str) -> None:
    path = run / "checkpoint-2" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"][name] = manifest["files"]["state.json"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    (run / "secret").write_text("secret", encoding="utf-8")
    said: list[str] = []
    assert latest_complete(run, say=said.append) == run / "checkpoint-1"
    assert "names a file outside its folder" in said[0]
