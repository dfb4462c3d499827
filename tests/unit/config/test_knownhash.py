"""A remembered hash is that of the content, for as long as nothing says that the file has changed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from eulerforge.config import atomic, knownhash
from eulerforge.config.knownhash import known_sha256


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large and has lain there for a while, and a cache of its own."""
    monkeypatch.setenv("EULERFORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(knownhash, "LARGE", 4)
    monkeypatch.setattr(atomic, "_CLOCK_TICK_NS", -(10**18))
    path = tmp_path / "weights"
    path.write_bytes(b"12345678")
    return path


def content_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def entry(cache: Path) -> Path:
    (only,) = (cache / "hashes").iterdir()
    return only


def test_it_is_computed_once(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = content_hash(large)
    assert known_sha256(large) == (right, False)
    monkeypatch.setattr(knownhash, "sha256_of", lambda path: pytest.fail("read again"))
    assert known_sha256(large) == (right, True)


def test_a_write_of_the_same_length_under_the_old_date_is_seen(large: Path) -> None:
    known_sha256(large)
    before = large.stat()
    with large.open("r+b") as file:
        file.write(b"8")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert large.stat().st_mtime_ns == before.st_mtime_ns
    assert known_sha256(large) == (content_hash(large), False)


def test_another_file_in_its_place_is_seen(large: Path, tmp_path: Path) -> None:
    known_sha256(large)
    other = tmp_path / "other"
    other.write_bytes(b"abcdefgh")
    os.utime(other, ns=(large.stat().st_atime_ns, large.stat().st_mtime_ns))
    other.replace(large)
    assert known_sha256(large) == (content_hash(large), False)


def test_what_was_changed_just_now_is_not_remembered(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_CLOCK_TICK_NS", 10**18)
    assert [known_sha256(large) for _ in range(2)] == [(content_hash(large), False)] * 2


def test_what_changes_while_it_is_read_is_not_remembered(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(path: Path) -> str:
        found = content_hash(path)
        path.write_bytes(b"other bytes")
        return found

    monkeypatch.setattr(knownhash, "sha256_of", slow)
    known_sha256(large)
    assert not (tmp_path / "cache").exists()


def test_a_small_file_is_read_each_time(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knownhash, "LARGE", 9)
    assert [known_sha256(large) for _ in range(2)] == [(content_hash(large), False)] * 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 3, "state": []}', "null", "[" * 100_000])
def test_a_damaged_entry_costs_time_only(large: Path, tmp_path: Path, text: str) -> None:
    known_sha256(large)
    entry(tmp_path / "cache").write_text(text, encoding="utf-8")
    assert known_sha256(large) == (content_hash(large), False)
    assert known_sha256(large) == (content_hash(large), True)


def test_a_hash_of_another_kind_is_not_taken(large: Path, tmp_path: Path) -> None:
    known_sha256(large)
    kept = json.loads(entry(tmp_path / "cache").read_text(encoding="utf-8"))
    entry(tmp_path / "cache").write_text(json.dumps({**kept, "sha256": "abc"}), encoding="utf-8")
    assert known_sha256(large) == (content_hash(large), False)


def test_a_cache_that_cannot_be_written_costs_time_only(large: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be", encoding="utf-8")
    assert [known_sha256(large) for _ in range(2)] == [(content_hash(large), False)] * 2


def test_two_names_of_one_file_are_one(large: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(large)
    known_sha256(large)
    assert known_sha256(link) == (content_hash(large), True)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        known_sha256(tmp_path / "absent")
