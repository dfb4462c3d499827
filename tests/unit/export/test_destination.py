"""Where an export goes: what it may replace, the room that it needs, and what a failing disk leaves."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eulerforge.errors import RunError, UsageError
from eulerforge.export import merged, peft_adapter
from eulerforge.export.destination import RECEIPT, prepare
from eulerforge.export.merged import merged_bytes, write_merged
from eulerforge.export.peft_adapter import write_peft
from eulerforge.export.rundir import TrainedRun
from eulerforge.training import diskroom

MakeRun = Callable[..., TrainedRun]
WRITERS = {"merged": write_merged, "peft": write_peft}
FORMATS = pytest.mark.parametrize("format", WRITERS)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@FORMATS
def test_overwrite_takes_what_the_export_wrote(make_run: MakeRun, tmp_path: Path, format: str) -> None:
    run, out = make_run(), tmp_path / "out"
    (run.source.folder / "additional_chat_templates").mkdir()
    (run.source.folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    WRITERS[format](run, out)
    listed = json.loads((out / RECEIPT).read_text())["files"]
    assert {*listed, RECEIPT} == contents(out).keys()
    assert "additional_chat_templates/tool.jinja" in listed
    assert {name for name, content in listed.items() if content is None} == {path.name for path in out.glob("*.safet*")}
    (out / "empty").mkdir()
    WRITERS[format](run, out, overwrite=True)
    assert not (out / "empty").exists()


def an_added_file(out: Path) -> str:
    (out / "notes.txt").write_text("mine")
    return "notes.txt"


def a_file_in_a_new_folder(out: Path) -> str:
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref: refs/heads/main")
    return ".git/HEAD"


def a_link_to_a_folder(out: Path) -> str:
    (out / "logs").symlink_to(out.parent)
    return "logs"


def a_changed_file(out: Path) -> str:
    (out / "tokenizer_config.json").write_text("{}")
    return "tokenizer_config.json"


def weights_of_its_own(out: Path) -> str:
    (out / "quantized.safetensors").write_bytes(b"mine")
    return "quantized.safetensors"


CHANGES = [an_added_file, a_file_in_a_new_folder, a_link_to_a_folder, a_changed_file, weights_of_its_own]


@FORMATS
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_person_has_put_there_is_named_and_stays(
    make_run: MakeRun, tmp_path: Path, format: str, change: Callable[[Path], str]
) -> None:
    run, out = make_run(), tmp_path / "out"
    WRITERS[format](run, out)
    name = change(out)
    before = contents(out)
    with pytest.raises(UsageError) as refused:
        WRITERS[format](run, out, overwrite=True)
    assert f"--overwrite would delete {out / name}, " in str(refused.value)
    assert "more)" not in str(refused.value)
    assert contents(out) == before


@pytest.mark.parametrize("receipt", ["{}", "[1]", "no json"])
def test_an_export_whose_receipt_lists_no_files_is_kept(make_run: MakeRun, tmp_path: Path, receipt: str) -> None:
    run, out = make_run(), tmp_path / "out"
    write_merged(run, out)
    (out / RECEIPT).write_text(receipt)
    with pytest.raises(UsageError, match=r"would delete .*chat_template.jinja, .* \(5 more\)"):
        write_merged(run, out, overwrite=True)


def test_what_comes_there_while_the_export_is_written_stays(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = make_run(), tmp_path / "out"
    write_merged(run, out)
    real = merged.write_shard
    monkeypatch.setattr(merged, "write_shard", lambda *given: (an_added_file(out), real(*given))[1])
    before = contents(out)
    with pytest.raises(UsageError, match=r"notes\.txt"):
        write_merged(run, out, overwrite=True)
    assert contents(out) == before | {"notes.txt": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "run"]


@pytest.mark.parametrize("dtype", [None, "bf16", "fp32"])
def test_the_bytes_that_a_merged_folder_needs_are_known_before(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None
) -> None:
    run, out = make_run(shard_size="20KB"), tmp_path / "not" / "there" / "out"
    needed = merged_bytes(run.source.folder, dtype)
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=needed)

    monkeypatch.setattr(diskroom.shutil, "disk_usage", usage)
    with pytest.raises(RunError) as refused:
        write_merged(run, out, dtype=dtype)
    assert str(refused.value).startswith(f"{out} was not written: ")
    assert f"({needed + diskroom.SLACK_BYTES:,} bytes) are needed" in str(refused.value)
    assert f"({needed:,} bytes) are free" in str(refused.value)
    assert "--output" in str(refused.value.problems[0].hint)
    assert asked == [tmp_path]
    assert not (tmp_path / "not").exists()
    monkeypatch.undo()
    write_merged(run, out, dtype=dtype)
    written = sum(len(content) for name, content in contents(out).items() if name != RECEIPT)
    assert abs(written - needed) < 20_000


NUMBERS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES]


@FORMATS
@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
def test_a_disk_that_fails_in_the_midst_is_one_line_and_leaves_nothing(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, number: int
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    run, out = make_run(), tmp_path / "exports" / "out"
    room, name = (merged, "write_shard") if format == "merged" else (peft_adapter, "save_file")
    monkeypatch.setattr(room, name, fails)
    with pytest.raises(RunError) as failed:
        WRITERS[format](run, out)
    assert str(failed.value).startswith(f"{out} could not be written: [Errno {number}] {os.strerror(number)}; ")
    assert "bytes) are needed" in str(failed.value)
    assert "--output" in str(failed.value.problems[0].hint)
    assert list(out.parent.iterdir()) == []


def test_what_killed_exports_left_is_said_and_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / ".staging-out-abc"
    left.mkdir()
    Path(f"{left}.lock").touch()
    monkeypatch.setattr(diskroom.shutil, "disk_usage", lambda _: SimpleNamespace(free=0 if left.exists() else 2**30))
    said: list[str] = []
    prepare(tmp_path / "out", 1000, said.append)
    assert said == [f"removed {left}, which an interrupted export left"]
    assert list(tmp_path.iterdir()) == []
