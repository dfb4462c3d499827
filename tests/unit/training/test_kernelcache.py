"""oneDNN's compiled kernels: bounded by the commands that compute, as the user says where he says something."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from eulerforge.training.kernelcache import KEPT, VARIABLES, bound_kernel_caches

from .fresh_process import last_line, said_before_torch

SHAPES = 900
MANY_SHAPES = f"""
import json, torch
from eulerforge.training.limits import resident_bytes
torch.set_num_threads(1)
weight = torch.ones(256, 128, dtype=torch.bfloat16)
def product(rows):
    return torch.nn.functional.linear(torch.ones(rows, 128, dtype=torch.bfloat16), weight)
product(64)
before = resident_bytes()
for rows in range(65, 65 + {SHAPES}):
    product(rows)
print(json.dumps({{"grown": resident_bytes() - before, "same": float(product(64).sum())}}))
"""


def test_the_users_own_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLES[0], raising=False)
    monkeypatch.setenv(VARIABLES[1], "7")
    bound_kernel_caches()
    assert os.environ[VARIABLES[0]] == str(KEPT)
    assert os.environ[VARIABLES[1]] == "7"


@pytest.mark.parametrize("command", ["train", "replay", "bench"])
def test_the_commands_that_compute_set_it_before_torch(command: str, tmp_path: Path) -> None:
    arguments = {
        "train": ["train", "--preset", "quickstart"],
        "replay": ["replay", str(tmp_path), "--steps", "1"],
        "bench": ["bench", str(tmp_path)],
    }[command]
    assert said_before_torch(arguments, VARIABLES) == f"{KEPT} {KEPT}"


def test_memory_stays_bounded_over_many_shapes() -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux says what a process holds")
    free, bounded = (
        json.loads(last_line(MANY_SHAPES, without=VARIABLES, **variables))
        for variables in ({}, dict.fromkeys(VARIABLES, str(KEPT)))
    )
    assert bounded["same"] == free["same"]
    if free["grown"] < 20 << 20:
        pytest.skip("this processor's bf16 products are not compiled by oneDNN")
    assert bounded["grown"] < 0.5 * free["grown"]
