"""A run that is killed at any write, flush, rename or deletion goes on to the bits of one that never was.

``EULERFORGE_SOAK=1`` (``make soak``) kills in all three ways at every operation; without it, kill -9 comes at every
operation of the three saves, and torn writes and power failures at every fifth.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from disk import BLACKOUT, DIE, KILLED, TEAR

SERVER = Path(__file__).parent / "killserver.py"
SOAK = os.environ.get("EULERFORGE_SOAK") == "1"


def kills(folder: Path, settings: dict[str, Any], **request: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """The operations of the straight run, and what became of each kill."""
    body = {"folder": str(folder), "settings": settings, **request}
    ran = subprocess.run(
        [sys.executable, str(SERVER), json.dumps(body)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    first, *rest = [json.loads(line) for line in ran.stdout.splitlines()]
    assert first["straight"] == 0
    return first["operations"], rest


def assert_none_lost(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["killed"] == KILLED, result
        assert result["resumed"] == 0, result
        assert result["same"], result
        assert result["left"] == [], result
        how = ("resumed from", "at step 0", "is finished")
        assert any(mark in line for mark in how for line in result["said"]), "the run says where it goes on"


def test_killed_at_every_operation_of_three_saves(prepared: Path, settings: dict[str, Any]) -> None:
    operations, results = kills(prepared, settings, modes=[DIE])
    kinds = {operation.split()[0] for operation in operations}
    assert kinds == {"mkdir", "write", "fsync", "rename", "replace", "exchange", "unlink", "rmdir"}
    assert [f"rename checkpoint-{step}" in operations for step in (1, 2, 3)] == [True] * 3
    assert operations[-3:-1] == ["rename final", "fsync ."]
    assert operations[-1].startswith("unlink .staging-final-")  # the lock beside the staging folder
    assert len(results) == len(operations) > 100
    assert_none_lost(results)


@pytest.mark.parametrize("mode", [TEAR, BLACKOUT])
def test_torn_writes_and_power_failures(prepared: Path, settings: dict[str, Any], mode: str) -> None:
    _, results = kills(prepared, settings, modes=[mode], every=1 if SOAK else 5)
    assert len(results) >= (20 if SOAK else 4)
    assert_none_lost(results)
