"""What a live writer holds stays, and what a killed one left goes."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eulerforge.config.atomic import remove_leftovers, staged_folder
from eulerforge.config.claims import abandoned, claimed

WRITER = """
import pathlib, sys
from eulerforge.config.atomic import staged_folder
with staged_folder(pathlib.Path(sys.argv[1])) as staging:
    (staging / "weights").write_text("half of them")
    print(staging.name, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("of", [None, "merged"])
def test_a_live_writer_s_folder_stays_and_a_killed_one_s_goes(tmp_path: Path, of: str | None) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "merged")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        name = writer.stdout.readline().strip()
        assert remove_leftovers(tmp_path, of=of) == []
        assert (tmp_path / name / "weights").is_file()
        writer.kill()
    assert remove_leftovers(tmp_path, of=of) == [name]
    assert list(tmp_path.iterdir()) == []


def test_who_writes_beside_others_takes_only_what_had_a_lock_and_was_to_have_that_name(tmp_path: Path) -> None:
    for name in (".staging-merged-abc", ".staging-merged-5-def", ".staging-other-ghi", ".staging-[x]-jkl"):
        (tmp_path / name).mkdir()
    for name in (".staging-other-ghi", ".staging-[x]-jkl"):
        (tmp_path / f"{name}.lock").touch()
    assert remove_leftovers(tmp_path, of="merged") == []
    assert remove_leftovers(tmp_path, of="[x]") == [".staging-[x]-jkl"]
    assert remove_leftovers(tmp_path) == [".staging-merged-5-def", ".staging-merged-abc", ".staging-other-ghi"]


def test_a_lock_without_a_folder_goes_and_one_that_is_a_link_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".staging-x-a.lock").touch()
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".staging-x-b").mkdir()
    (tmp_path / ".staging-x-b.lock").symlink_to(tmp_path / "victim")
    assert remove_leftovers(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [".staging-x-b", ".staging-x-b.lock", "victim"]


def test_a_lock_that_was_swept_before_it_was_taken_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, swept = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not swept:
            swept.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            Path(swept[0]).unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with claimed(tmp_path, ".staging-x-") as path:
        assert Path(f"{path}.lock").exists()
        assert f"{path}.lock" not in swept
        with abandoned(path) as free:
            assert not free
    assert list(tmp_path.iterdir()) == []


def test_where_no_file_can_be_locked_nobody_is_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with staged_folder(tmp_path / "x"):
        assert remove_leftovers(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
