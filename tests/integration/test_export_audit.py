"""Adapters that were spoilt on disk, through the real commands: named, exit 1, nothing written, --force records it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinyrun
import torch
from safetensors.torch import load_file, save_file

from eulerforge.cli.main import main
from eulerforge.training.manifest import verify

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared folder of a finished run with held-out rows; tests only read it."""
    folder = tinyrun.prepare(tmp_path_factory.mktemp("audited"))
    assert main(tinyrun.arguments(folder, data__validation__size=4)) == 0
    return folder


def spoilt(trained: Path, folder: Path, spoil: Callable[[torch.Tensor], Any]) -> Path:
    """A copy of the run whose adapter was changed, with a manifest that fits it."""
    import hashlib

    run = Path(shutil.copytree(trained / "run", folder / "run"))
    path = run / "final" / "adapter.safetensors"
    tensors = load_file(path)
    spoil(tensors[f"{LAYER}.lora_B"])
    save_file(tensors, path, metadata={"format": "pt"})
    manifest = json.loads((run / "final" / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"][path.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (run / "final" / "manifest.json").write_text(json.dumps(manifest))
    verify(run / "final")
    return run


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda b: b[0, 0].fill_(math.nan), "holds NaN or infinite values"),
        (lambda b: b.zero_(), "was never trained"),
        (lambda b: b.mul_(1e4), "times as large as the weight"),
    ],
    ids=["nan", "untouched", "exploding"],
)
@pytest.mark.parametrize("command", ["merge", "merged", "peft"])
def test_a_spoilt_layer_is_named_and_not_published(
    trained: Path,
    tmp_path: Path,
    spoil: Callable[[torch.Tensor], Any],
    words: str,
    command: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = spoilt(trained, tmp_path, spoil), tmp_path / "out"
    arguments = ["merge"] if command == "merge" else ["export", "--format", command]
    arguments += [str(run), "--output", str(out)]
    assert main(arguments) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error:", "Traceback"))]
    (error,) = errors
    assert error.startswith(f"error: {LAYER}.weight: ")
    assert words in error
    assert not out.exists()
    assert main([*arguments, "--force"]) == 0
    assert "warning: written because of --force" in capsys.readouterr().err
    assert words in json.loads((out / "eulerforge_export.json").read_text())["audit"]["forced"][0]


def test_a_sound_merge_says_what_it_measured(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["merge", str(trained / "run"), "--output", str(tmp_path / "out"), "--layers"]) == 0
    shown = capsys.readouterr().out
    assert "lost to rounding as fp32" in shown
    assert "top-1 agreement 100.0%" in shown
    assert "tokens of held-out rows" in shown
    assert f"{LAYER}.weight" in shown
    assert main(["merge", str(trained / "run"), "--output", str(tmp_path / "again"), "--json"]) == 0
    audit = json.loads(capsys.readouterr().out)["data"]["audit"]
    assert audit == json.loads((tmp_path / "again" / "eulerforge_export.json").read_text())["audit"]
    assert audit["logits"]["kl"] < 1e-6
    assert 0 < audit["logits"]["tokens"] <= 1024
    assert len(audit["layers"]) == 15
