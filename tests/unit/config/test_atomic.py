"""Complete or invisible: what a reader sees before, during and after a write."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import pytest

from eulerforge.config.atomic import (
    STAGING_PREFIX,
    commit_folder,
    remove_leftovers,
    sha256_of,
    staged_folder,
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
