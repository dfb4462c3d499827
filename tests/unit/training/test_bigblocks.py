"""torch's switch for large tensors: set by the commands that compute, as the user says where he says something."""

from __future__ import annotations

import json
import os
import sys

import pytest

from eulerforge.config.schema import LoadPrecision, ModelConfig, RunConfig, TrainingConfig
from eulerforge.models import processor
from eulerforge.training.bigblocks import VARIABLE, align_big_blocks, big_blocks_are_aligned

from .fresh_process import last_line, said_before_torch

PAGE = 4096
ALIGNED = f"""
import json
from eulerforge.config.schema import RunConfig, TrainingConfig
from eulerforge.training.bigblocks import align_big_blocks
align_big_blocks(RunConfig(model_name="m", training=TrainingConfig(gradient_checkpointing="all")))
import torch
kept = [torch.empty(size) for size in (3 << 20, 1 << 20, 3 << 20) for _ in range(4)]
print(json.dumps([tensor.data_ptr() % {PAGE} for tensor in kept]))
"""


def test_the_users_own_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    align_big_blocks(RunConfig(model_name="m", training=TrainingConfig(gradient_checkpointing="all")))
    assert os.environ[VARIABLE] == "0"
    assert not big_blocks_are_aligned()


@pytest.mark.parametrize(
    ("again", "mode", "bf16", "gains"),
    [
        ("off", "bf16", True, False),
        ("off", "auto", True, False),
        ("off", "auto", False, True),  # auto is fp32 there
        ("off", "bf16", False, True),
        ("off", "fp32", True, True),
        ("off", "int8", True, False),
        ("off", "int4", False, True),
        ("all", "bf16", True, True),
        ("auto", "bf16", True, True),
    ],
)
def test_only_runs_that_gain_get_it(
    monkeypatch: pytest.MonkeyPatch, again: str, mode: str, bf16: bool, gains: bool
) -> None:
    monkeypatch.setattr(processor, "has_products", lambda half: bf16)
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    align_big_blocks(
        RunConfig(
            model_name="m",
            model=ModelConfig(load_precision=LoadPrecision(mode=mode)),
            training=TrainingConfig(gradient_checkpointing=again),
        )
    )
    assert big_blocks_are_aligned() == gains


@pytest.mark.skipif(sys.platform != "linux", reason="torch's switch does nothing but on Linux")
def test_large_tensors_begin_at_the_border_of_a_page() -> None:
    assert set(json.loads(last_line(ALIGNED, without=[VARIABLE]))) == {0}
    assert set(json.loads(last_line(ALIGNED, without=[VARIABLE], **{VARIABLE: "0"}))) != {0}


@pytest.mark.parametrize(("again", "told"), [("all", "1"), ("off", "None")])
def test_the_command_says_it_before_torch(again: str, told: str) -> None:
    settings = [f"training.gradient_checkpointing={again}", "model.load_precision.compute_dtype=bf16"]
    arguments = ["train", "--preset", "quickstart", *(word for setting in settings for word in ("--set", setting))]
    assert said_before_torch(arguments, [VARIABLE]) == told
