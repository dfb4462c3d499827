"""Links where a run reads, writes and deletes: a run writes into its own folder, and deletes a link, not its target."""

from __future__ import annotations

import json
import os
from pathlib import Path

import damage
import pytest
import tinyrun

from eulerforge.cli.main import main
from eulerforge.config.atomic import remove_leftovers
from eulerforge.training.manifest import TrainState
from eulerforge.training.rotation import delete_rotated

Shown = pytest.CaptureFixture[str]
PRECIOUS = "precious"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps with all of its checkpoints."""
    folder = tinyrun.prepare(tmp_path_factory.mktemp("links"), rows=8)
    assert main(tinyrun.arguments(folder, training__save_steps=1, training__max_train_steps=3)) == 0
    return folder


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder."""
    return damage.copy(prepared / "run", tmp_path / "run")


def moved(path: Path) -> Path:
    """Put what has this name elsewhere, and a link to it in its place; gives back where it is."""
    away = path.parent.parent / "away" / path.name
    away.parent.mkdir(exist_ok=True)
    path.rename(away)
    path.symlink_to(away)
    return away


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith((".staging", ".replaced"))]


def words(prepared: Path, run: Path, **changes: object) -> list[str]:
    keys = {"training__save_steps": 1, "training__max_train_steps": 3, **changes}
    return tinyrun.arguments(prepared, output_dir=str(run), **keys)


def test_rotation_takes_the_link_and_leaves_what_it_leads_to(run: Path) -> None:
    away = moved(run / "checkpoint-1")
    before = content(away)
    run_id = json.loads((run / "checkpoint-3" / "state.json").read_text(encoding="utf-8"))["run_id"]
    delete_rotated(run, TrainState(step=3, run_id=run_id), keep_last=1, keep_best=None)
    assert not (run / "checkpoint-1").is_symlink()
    assert content(away) == before
    assert (run / "checkpoint-3").is_dir()
    assert left_over(run) == []


def test_overwrite_takes_links_and_leaves_what_they_lead_to(prepared: Path, run: Path) -> None:
    away = [moved(run / name) for name in ("checkpoint-2", "final")]
    files = [moved(run / name) for name in ("metrics.jsonl", "receipt.json", "resolved_config.toml", "summary.json")]
    before = [content(folder) for folder in away], [file.read_bytes() for file in files]
    assert main([*words(prepared, run, training__max_train_steps=1), "--overwrite"]) == 0
    assert ([content(folder) for folder in away], [file.read_bytes() for file in files]) == before
    assert not any(path.is_symlink() for path in run.iterdir())
    assert left_over(run) == []


def test_a_resume_reads_a_linked_checkpoint_and_writes_none_of_its_files(prepared: Path, run: Path) -> None:
    away = [moved(run / name) for name in ("checkpoint-3", "final", "metrics.jsonl", "summary.json")]
    damage.removed(away[1] / "manifest.json")
    before = [content(path) if path.is_dir() else path.read_bytes() for path in away]
    assert main([*words(prepared, run), "--resume"]) == 0
    assert [content(path) if path.is_dir() else path.read_bytes() for path in away] == before
    assert (run / "final" / "manifest.json").is_file()
    assert left_over(run) == []


def test_an_output_folder_that_is_a_link_is_the_folder_that_it_leads_to(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    assert main(words(prepared, tmp_path / "run")) == 0
    assert (tmp_path / "run").is_symlink()
    assert (tmp_path / "disk" / "final" / "manifest.json").is_file()
    assert main([*words(prepared, tmp_path / "run", training__max_train_steps=1), "--overwrite"]) == 0
    assert (tmp_path / "run").is_symlink()
    assert not (tmp_path / "disk" / "checkpoint-3").exists()


def test_a_lock_that_is_a_link_is_refused_and_its_target_kept(prepared: Path, run: Path, capsys: Shown) -> None:
    victim = run.parent / "victim"
    victim.write_text(PRECIOUS, encoding="utf-8")
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(victim)
    for more in ("--resume", "--overwrite"):
        capsys.readouterr()
        assert main([*words(prepared, run), more]) == 2
        assert ".lock is a link" in capsys.readouterr().err
    assert victim.read_text(encoding="utf-8") == PRECIOUS


def test_leftovers_that_are_links_go_and_their_targets_stay(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text(PRECIOUS, encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".staging-a").symlink_to(tmp_path / "kept")
    (tmp_path / "run" / ".staging-b").symlink_to(tmp_path / "not there")
    (tmp_path / "run" / ".staging-c").mkdir()
    (tmp_path / "run" / ".staging-c" / "inside").symlink_to(tmp_path / "kept")
    assert len(remove_leftovers(tmp_path / "run")) == 3
    assert os.listdir(tmp_path / "run") == []
    assert (tmp_path / "kept" / "file").read_text(encoding="utf-8") == PRECIOUS


def test_an_export_publishes_no_file_that_a_link_in_the_base_leads_to(
    prepared: Path, tmp_path: Path, capsys: Shown
) -> None:
    (tmp_path / "id_rsa").write_text(PRECIOUS, encoding="utf-8")
    base = damage.copy(prepared / "base", tmp_path / "base")
    assert main(words(prepared, tmp_path / "run", model_name=str(base), training__max_train_steps=1)) == 0
    (base / "NOTES.md").symlink_to(tmp_path / "id_rsa")
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "run")]) == 2
    assert "NOTES.md is a link that leads out of the base's folder" in capsys.readouterr().err
    assert not (tmp_path / "run" / "merged").exists()


def test_a_base_in_the_hub_s_cache_is_all_links_and_exported(prepared: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--somebody--tiny"
    base = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    base.mkdir(parents=True)
    for number, path in enumerate(sorted((prepared / "base").iterdir())):
        blob = repository / "blobs" / f"{number}"
        blob.write_bytes(path.read_bytes())
        (base / path.name).symlink_to(Path("..", "..", "blobs", f"{number}"))
    assert main(words(prepared, tmp_path / "run", model_name=str(base), training__max_train_steps=1)) == 0
    assert main(["merge", str(tmp_path / "run")]) == 0
    assert not any(path.is_symlink() for path in (tmp_path / "run" / "merged").iterdir())


def test_a_base_in_the_hub_s_cache_whose_blobs_are_shared_is_exported(prepared: Path, tmp_path: Path) -> None:
    """huggingface_hub 2 keeps large files once for all models; the blobs of a model are links there."""
    shared = tmp_path / "blobs" / "ab"
    repository = tmp_path / "models--somebody--tiny"
    base = repository / "snapshots" / "abc"
    for folder in (shared, repository / "blobs", base):
        folder.mkdir(parents=True)
    (tmp_path / "blobs" / ".huggingface-shared-blobs").write_text("1")
    for number, path in enumerate(sorted((prepared / "base").iterdir())):
        (shared / f"{number}").write_bytes(path.read_bytes())
        (repository / "blobs" / f"{number}").symlink_to(Path("..", "..", "blobs", "ab", f"{number}"))
        (base / path.name).symlink_to(Path("..", "..", "blobs", f"{number}"))
    assert main(words(prepared, tmp_path / "run", model_name=str(base), training__max_train_steps=1)) == 0
    assert main(["merge", str(tmp_path / "run")]) == 0
    assert not any(path.is_symlink() for path in (tmp_path / "run" / "merged").iterdir())


def test_an_export_over_a_link_leaves_what_it_leads_to(prepared: Path, run: Path) -> None:
    assert main(["merge", str(run)]) == 0
    away = moved(run / "merged")
    before = content(away)
    assert main(["merge", str(run), "--overwrite"]) == 0
    assert content(away) == before
    assert not (run / "merged").is_symlink()
    assert left_over(run) == []
