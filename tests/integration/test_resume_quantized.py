"""Exact resume on a quantized base: killed after a checkpoint, it ends with the bits of the run that was not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tinyrun

from eulerforge.cli.main import main

pytest.importorskip("bitsandbytes", reason="the qlora extra is not installed")


@pytest.mark.parametrize("mode", ["int4", "int8"])
def test_a_resumed_run_on_a_quantized_base_is_exact(
    tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tinyrun.prepare(tmp_path, hidden_size=64, intermediate_size=96, head_dim=16)
    settings: dict[str, Any] = {
        "model__load_precision__mode": mode,
        "data__validation__size": 4,
        "injection__lora_dropout": 0.1,
        "training__save_steps": 2,
        "training__val_steps": 2,
        "training__threads": 1,
    }
    words = tinyrun.arguments(folder, **settings)
    assert main(words) == 0
    straight = Path(shutil.copytree(folder / "run", folder / "straight"))
    for name in ("final", "checkpoint-4"):
        shutil.rmtree(folder / "run" / name)
    assert main([*words, "--resume"]) == 0
    assert "at step 2" in capsys.readouterr().err
    for name in ("checkpoint-4/adapter.safetensors", "checkpoint-4/optimizer.safetensors", "final/adapter.safetensors"):
        assert (straight / name).read_bytes() == (folder / "run" / name).read_bytes(), name
    assert tinyrun.metrics(straight) == tinyrun.metrics(folder / "run")
    assert main(["replay", str(folder / "run"), "--steps", "4"]) == 0
