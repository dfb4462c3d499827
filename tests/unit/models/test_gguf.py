"""A GGUF file without what reads it is one line that says what to install."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from eulerforge.errors import ModelError
from eulerforge.models.gguf import NEEDED, converted_folder


@pytest.mark.parametrize("absent", NEEDED)
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == absent else find(name, *rest)

    monkeypatch.setattr("eulerforge.models.gguf.importlib.util.find_spec", without)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=f"reading model.gguf needs {absent}$") as caught:
        converted_folder(tmp_path / "model.gguf")
    assert caught.value.problems[0].hint == "pip install 'eulerforge-core[gguf]'"
