"""Assembled runs of a tiny model, for the rooms that need one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinyrun


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and 24 rows; tests only read it."""
    return tinyrun.prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def make_run(prepared: Path, tmp_path: Path) -> Callable[..., Any]:
    """Assembles a run of the tiny Llama that writes into this test's own folder."""

    def make(**changes: Any) -> Any:
        return tinyrun.assembled(prepared, **{"output_dir": str(tmp_path / "run"), **changes})

    return make
