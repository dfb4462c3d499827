"""Complete or invisible: what a reader sees before, during and after a write."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from eulerforge.config import atomic
from eulerforge.config.atomic import (
    STAGING_PREFIX,
    commit_folder,
    exchange,
    file_state,
    put_back_replaced,
    remove_leftovers,
    sha256_of,
    staged_folder,
    write_file,
    write_json_atomic,
    write_text_atomic,
)


def test_a_text_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "state.json"
    write_text_atomic(path, "first")
    write_text_atomic(path, "second é")
    assert path.read_text(encoding="utf-8") == "second é"
    assert [entry.name for entry in path.parent.iterdir()] == ["state.json"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600


def test_json_is_readable(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"key": [1, "ü"]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"key": [1, "ü"]}


def test_a_staged_folder_is_invisible_until_the_block_ends(tmp_path: Path) -> None:
    final = tmp_path / "checkpoint-1"
    with staged_folder(final) as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "a").write_text("x")
        assert not final.exists()
        assert staging.name.startswith(STAGING_PREFIX)
    assert (final / "inner" / "a").read_text() == "x"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_block_that_raises_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), staged_folder(tmp_path / "x") as staging:
        staging.write_text("a folder takes no text")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_on_request(tmp_path: Path) -> None:
    final = tmp_path / "x"
    with staged_folder(final) as staging:
        (staging / "a").write_text("1")
    with pytest.raises(FileExistsError), staged_folder(final) as staging:
        (staging / "a").write_text("2")
    assert (final / "a").read_text() == "1"
    with staged_folder(final, replace=True) as staging:
        (staging / "b").write_text("3")
    assert [entry.name for entry in final.iterdir()] == ["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    for text in ("first", "second"):
        staging = tmp_path / f"{STAGING_PREFIX}{text}"
        staging.mkdir()
        (staging / "a").write_text(text)
        commit_folder(staging, tmp_path / "final")
    assert (tmp_path / "final" / "a").read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]


def test_leftovers_are_named_and_removed(tmp_path: Path) -> None:
    (tmp_path / ".staging-checkpoint-3-abc").mkdir()
    (tmp_path / ".staging-file").write_text("")
    (tmp_path / "kept").write_text("")
    assert remove_leftovers(tmp_path) == [".staging-checkpoint-3-abc", ".staging-file"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_write_all_survives_a_system_that_takes_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:3])))
    write_file(tmp_path / "a", bytes(range(50)))
    assert (tmp_path / "a").read_bytes() == bytes(range(50))
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a", b"never over another file")


def test_two_folders_change_places(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "in").write_text(name)
    assert exchange(tmp_path / "a", tmp_path / "b") is True
    assert [(tmp_path / name / "in").read_text() for name in "ab"] == ["b", "a"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "absent")


@pytest.mark.parametrize("able", [True, False])
def test_a_replacement_that_dies_at_any_rename_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    """With the exchange there is no moment without a folder; without it, the next writer puts the old one back."""
    final, seen = tmp_path / "x", []
    with staged_folder(final) as staging:
        (staging / "in").write_text("old")
    if not able:
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    real = os.rename
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, lambda *names: (seen.append(final.exists()), real(*names))[1])
    with staged_folder(final, replace=True) as staging:
        (staging / "in").write_text("new")
    assert (final / "in").read_text() == "new"
    assert seen == ([] if able else [True, False])
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_folder_hidden_by_a_dead_writer_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".replaced-x").mkdir()
    (tmp_path / ".replaced-x" / "in").write_text("old")
    (tmp_path / ".replaced-y").mkdir()
    (tmp_path / "y").mkdir()
    assert put_back_replaced(tmp_path) == ["x"]
    assert (tmp_path / "x" / "in").read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x", "y"]


def test_the_next_writer_puts_a_hidden_folder_back_first(tmp_path: Path) -> None:
    (tmp_path / ".replaced-x").mkdir()
    with pytest.raises(IsADirectoryError), staged_folder(tmp_path / "x", replace=True) as staging:
        staging.write_text("a folder takes no text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_the_state_of_a_file_changes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert file_state(path) != file_state(path), "what was changed just now may change again within one tick"
    monkeypatch.setattr(atomic, "_CLOCK_TICK_NS", -(10**18))
    before = file_state(path)
    assert file_state(path) == before
    os.utime(path, ns=(1, 1))
    assert file_state(path) != before
    with pytest.raises(FileNotFoundError):
        file_state(tmp_path / "absent")
