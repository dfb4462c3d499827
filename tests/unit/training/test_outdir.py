"""The run's folder: refused, locked, cleared."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from eulerforge.config.atomic import staged_folder
from eulerforge.config.schema import DataConfig, ModelConfig, RunConfig, ValidationConfig
from eulerforge.errors import RunError, UsageError
from eulerforge.models.source import EXPORT_FILE, BaseSource
from eulerforge.training import outdir


def run_in(out: Path, *, finished: bool = False) -> Path:
    out.mkdir(exist_ok=True)
    (out / outdir.CONFIG_FILE).write_text("")
    for name in ("checkpoint-2", *([outdir.FINAL] if finished else [])):
        (out / name).mkdir()
        (out / name / outdir.MANIFEST_FILE).write_text("{}")
    return out


def test_a_fresh_folder_an_absent_one_and_a_folder_with_other_things_are_free(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "absent" / "deep"):
        outdir.check_free(out, resume=False, overwrite=False)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(("finished", "hint"), [(False, "--resume goes on"), (True, "--overwrite starts anew")])
def test_a_used_folder_is_refused_and_says_what_to_do(tmp_path: Path, finished: bool, hint: str) -> None:
    out = run_in(tmp_path, finished=finished)
    assert outdir.is_used(out)
    assert outdir.is_finished(out) is finished
    with pytest.raises(UsageError, match="finished run") as refused:
        outdir.check_free(out, resume=False, overwrite=False)
    assert hint in (refused.value.problems[0].hint or "")
    outdir.check_free(out, resume=True, overwrite=False)
    outdir.check_free(out, resume=False, overwrite=True)


@pytest.mark.parametrize("name", ["metrics.jsonl", "receipt.json", "final", "checkpoint-500"])
def test_what_looks_like_a_run_but_is_none_is_never_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    for resume, overwrite in ((False, False), (True, False), (False, True)):
        with pytest.raises(UsageError, match="but no run"):
            outdir.check_free(tmp_path, resume=resume, overwrite=overwrite)


def test_resume_and_overwrite_together_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        outdir.check_free(tmp_path, resume=True, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is not a folder"):
        outdir.check_free(tmp_path / "file", resume=False, overwrite=False)


def test_one_writer_at_a_time_and_the_next_when_it_has_gone(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom eulerforge.training.outdir import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    out = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"another run is writing .*process {other.pid}"), outdir.locked(out):
            pass
        other.kill()
    with outdir.locked(out):
        assert (out / outdir.LOCK_FILE).read_text() == str(os.getpid())
    with outdir.locked(out):
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"), outdir.locked(tmp_path / "file" / "run"):
        pass


def test_clear_takes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    out = run_in(tmp_path, finished=True)
    for name in ("metrics.jsonl", "receipt.json", "summary.json", "notes.txt"):
        (out / name).write_text("")
    (out / "checkpoint-9").mkdir()
    (out / "checkpoint-9" / "weights.bin").write_text("not ours: it has no manifest")
    outdir.clear(out)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-9", "notes.txt"]


def test_a_checkpoint_that_was_kept_under_another_name_is_no_run_s(tmp_path: Path) -> None:
    out = run_in(tmp_path / "run")
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-best")
    before = outdir.own_bytes(out)
    (out / "checkpoint-best" / "adapter.safetensors").write_bytes(b"x" * 1000)
    assert outdir.own_bytes(out) == before
    outdir.clear(out)
    assert [path.name for path in out.iterdir()] == ["checkpoint-best"]
    outdir.check_free(out, resume=False, overwrite=False)


@pytest.mark.parametrize("name", ["checkpoint-4", "final"])
def test_a_resume_refuses_it_too_but_writes_a_damaged_one_anew(tmp_path: Path, name: str) -> None:
    out = run_in(tmp_path)
    (out / name).mkdir()
    for ours in ("state.json", "adapter.safetensors", "model_with_adapters-00001-of-00002.safetensors"):
        outdir.refuse_foreign(out, damaged_may_go=True)
        (out / name / ours).write_text("")
    outdir.refuse_foreign(out, damaged_may_go=True)
    (out / name / "adapter.safetensors.old").write_text("mine")
    with pytest.raises(UsageError, match=rf"{name} has no manifest.json"):
        outdir.refuse_foreign(out, damaged_may_go=True)
    shutil.rmtree(out / name)
    (out / name).write_text("a file")
    with pytest.raises(UsageError, match=rf"{name} has no manifest.json"):
        outdir.refuse_foreign(out, damaged_may_go=True)


@pytest.mark.parametrize("name", ["checkpoint-4", "final"])
def test_overwrite_refuses_a_folder_that_no_run_wrote(tmp_path: Path, name: str) -> None:
    out = run_in(tmp_path)
    (out / name).mkdir()
    outdir.check_free(out, resume=False, overwrite=True)
    (out / name / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=rf"{name} has no manifest.json"):
        outdir.check_free(out, resume=False, overwrite=True)
    (out / name).rename(out / "checkpoint-mine")
    outdir.check_free(out, resume=False, overwrite=True)


def test_sweep_says_what_it_removes(tmp_path: Path) -> None:
    (tmp_path / ".staging-checkpoint-3-x").mkdir()
    (tmp_path / "kept").mkdir()
    said: list[str] = []
    outdir.sweep(tmp_path, said.append)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert len(said) == 1
    assert ".staging-checkpoint-3-x" in said[0]


def test_sweep_leaves_what_a_live_merge_writes(tmp_path: Path) -> None:
    said: list[str] = []
    with staged_folder(tmp_path / "merged") as staging:
        outdir.sweep(tmp_path, said.append)
        assert staging.is_dir()
    assert said == []


def test_exports_in_the_folder_are_known(tmp_path: Path) -> None:
    for name in ("merged", "adapter", "notes", ".staging-merged-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("a.txt" if name == "notes" else EXPORT_FILE)).write_text("{}")
    assert outdir.exports_in(tmp_path) == [tmp_path / "adapter", tmp_path / "merged"]


def test_what_clearing_would_free_is_counted(tmp_path: Path) -> None:
    out = run_in(tmp_path / "run", finished=True)
    (out / outdir.FINAL / "adapter.safetensors").write_bytes(b"x" * 1000)
    (out / "notes.txt").write_bytes(b"x" * 5000)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / outdir.MANIFEST_FILE).write_bytes(b"x" * 3000)
    (out / "checkpoint-7").symlink_to(tmp_path / "elsewhere")  # of which only the link goes
    assert outdir.own_bytes(out) == 1000 + 2 * len("{}")
    assert outdir.own_bytes(tmp_path / "absent") == 0


def test_a_resumed_run_takes_the_commit_that_it_began_with(tmp_path: Path) -> None:
    out = run_in(tmp_path / "run")
    config = RunConfig(model_name="somebody/tiny")
    assert outdir.with_recorded_revision(config, out) is config
    (out / outdir.CONFIG_FILE).write_text('model_name = "somebody/tiny"\n[model]\nrevision = "abc"\n')
    assert outdir.with_recorded_revision(config, out).model.revision == "abc"
    other = RunConfig(model_name="somebody/else")
    assert outdir.with_recorded_revision(other, out) is other
    named = RunConfig(model_name="somebody/tiny", model=ModelConfig(revision="main"))
    assert outdir.with_recorded_revision(named, out) is named


def test_what_is_recorded_is_found_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somebody" / "tiny").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "held_out.jsonl"):
        (tmp_path / name).touch()
    data = DataConfig(
        path=("a.jsonl", "pkg://eulerforge/b.jsonl", "b.jsonl"), validation=ValidationConfig(path=("held_out.jsonl",))
    )
    config = RunConfig(model_name="somebody/tiny", data=data, output_dir="somebody")
    source = BaseSource(kind="folder", name="somebody/tiny", folder=Path("somebody/tiny"))
    found = outdir.found_from_everywhere(config, source)
    assert found.model_name == str(tmp_path / "somebody" / "tiny")
    assert found.output_dir == str(tmp_path / "somebody")
    assert found.data.path == (str(tmp_path / "a.jsonl"), "pkg://eulerforge/b.jsonl", str(tmp_path / "b.jsonl"))
    assert found.data.validation.path == (str(tmp_path / "held_out.jsonl"),)
    # what came from the hub keeps its name, whatever lies here
    hub = attrs.evolve(source, kind="hub")
    assert outdir.found_from_everywhere(config, hub).model_name == "somebody/tiny"
