"""A start looks at a model folder several times; each file is parsed once, and again when it has changed."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny

from eulerforge.errors import ModelError
from eulerforge.models import gguf, soundness
from eulerforge.models.soundness import check_folder


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file's JSON was parsed."""
    counted: Counter[str] = Counter()
    parse = soundness._json_object

    def noted(path: Path) -> dict[str, Any]:
        counted[path.name] += 1
        return parse(path)

    monkeypatch.setattr(soundness, "_json_object", noted)
    return counted


def settle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the files had lain there for a while."""
    monkeypatch.setattr("eulerforge.config.atomic._CLOCK_TICK_NS", -(10**18))
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))


def test_a_file_is_parsed_once(tmp_path: Path, looks: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path)
    settle(folder, monkeypatch)
    for _ in range(3):
        check_folder(folder, weights=False)
    assert looks["tokenizer.json"] == 1


def test_a_file_that_changed_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path)
    settle(folder, monkeypatch)
    check_folder(folder)
    path = folder / "tokenizer.json"
    size = path.stat().st_size
    path.write_bytes(b"[" + b" " * (size - 2) + b"]")
    os.utime(path, ns=(1, 1))  # same size, same time of its content: the entry's own time tells
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a JSON object"):
        check_folder(folder)


def test_what_is_wrong_stays_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path)
    (folder / "generation_config.json").write_text("{", encoding="utf-8")
    settle(folder, monkeypatch)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"generation_config\.json is not valid JSON"):
            check_folder(folder)


def test_the_hash_of_a_gguf_file_follows_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"one")
    settle(tmp_path, monkeypatch)
    first = gguf._digest(path, gguf.file_state(path))
    assert gguf._digest(path, gguf.file_state(path)) == first
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert gguf._digest(path, gguf.file_state(path)) != first
