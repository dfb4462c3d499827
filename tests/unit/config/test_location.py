"""pkg:// locations: found without importing the package, never outside of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from eulerforge.config.location import from_the_root, resolve_location
from eulerforge.errors import UsageError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package that must not be imported."""
    folder = tmp_path / "some_rows"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "data" / "rows.jsonl").write_text("{}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_package_file_is_found_without_import(package: Path) -> None:
    assert resolve_location("pkg://some_rows/data/rows.jsonl") == package / "data" / "rows.jsonl"
    assert "some_rows" not in sys.modules


def test_a_plain_path_is_only_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert resolve_location("~/rows.jsonl") == Path("/home/somebody/rows.jsonl")
    assert resolve_location("~no-such-user/x") == Path("~no-such-user/x")
    assert resolve_location("not/there") == Path("not/there")


def test_what_is_there_is_named_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    assert from_the_root("./rows.jsonl") == str(tmp_path / "rows.jsonl")
    for text in ("Qwen/Qwen3-0.6B", "pkg://eulerforge/rows.jsonl", "~nobody-of-this-name/rows.jsonl"):
        assert from_the_root(text) == text
    # a name that is no text, which resolved_config.toml cannot hold
    unreadable = tmp_path / os.fsdecode(b"\xff")
    unreadable.mkdir()
    (unreadable / "rows.jsonl").touch()
    monkeypatch.chdir(unreadable)
    assert from_the_root("rows.jsonl") == "rows.jsonl"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("pkg://absent_rows/a.jsonl", "not installed", "pip install absent-rows"),
        ("pkg://some_rows/data/row.jsonl", "has no file data/row.jsonl", "did you mean rows.jsonl?"),
        ("pkg://some_rows/other/rows.jsonl", "has no file", "there is no folder other"),
        ("pkg://some_rows/../secret", "outside", "without .."),
        ("pkg://some_rows//etc/passwd", "outside", "inside the package"),
        ("pkg://some_rows", "is not a package location", "pkg://package/"),
        ("pkg://some.rows/a", "is not a package location", "pkg://package/"),
        ("pkg:///a", "is not a package location", "pkg://package/"),
    ],
)
def test_what_is_wrong_is_said(package: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message.replace(".", r"\.")) as caught:
        resolve_location(text)
    assert hint in str(caught.value.problems[0].hint)
