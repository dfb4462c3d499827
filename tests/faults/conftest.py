"""A tiny run to break: one layer, three steps, a checkpoint after each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tinyrun

sys.path.insert(0, str(Path(__file__).parent))

SETTINGS: dict[str, Any] = {
    "data__validation__size": 2,
    "injection__lora_dropout": 0.1,
    "training__max_train_steps": 3,
    "training__save_steps": 1,
    "training__val_steps": 2,
    "training__threads": 1,
    "checkpoint__keep_last": 1,
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer and 8 rows; tests only read it."""
    return tinyrun.prepare(tmp_path_factory.mktemp("prepared"), rows=8, num_hidden_layers=1)


@pytest.fixture
def settings() -> dict[str, Any]:
    return dict(SETTINGS)
