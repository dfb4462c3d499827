"""A PEFT adapter from elsewhere, and a run folder from elsewhere: nothing of an adapter is read, a run is a preset."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

import damage
import pytest
import tinyrun
import torch
from safetensors.torch import save_file

from eulerforge.cli.main import main

Shown = pytest.CaptureFixture[str]
SOUND = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "somebody/else",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
}


class Marks:
    """What a pickle that was read would do."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tinyrun.prepare(tmp_path_factory.mktemp("adapters"), rows=8)
    assert main(tinyrun.arguments(folder, training__max_train_steps=1)) == 0
    return folder


CONFIGS: dict[str, Any] = {
    "sound": SOUND,
    "wrong types": {"peft_type": 7, "r": "four", "target_modules": {"a": 1}, "base_model_name_or_path": []},
    "huge rank": {**SOUND, "r": 10**18},
    "a regex that never ends": {**SOUND, "target_modules": "(a+)+$" * 50},
    "another base": {**SOUND, "base_model_name_or_path": "../../../etc"},
    "code": {**SOUND, "auto_mapping": {"base_model_class": "os.system", "parent_library": "os"}},
    "deep": "[" * 100_000,
    "nothing": "",
    "bytes": "\udcff",
}


@pytest.mark.parametrize("with_base", [True, False], ids=["in a base", "alone"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_in_a_model_folder_is_refused_and_nothing_of_it_read(
    prepared: Path, tmp_path: Path, capsys: Shown, kind: str, with_base: bool
) -> None:
    folder = damage.copy(prepared / "base", tmp_path / "base")
    if not with_base:
        damage.removed(folder / "config.json")
        damage.removed(folder / "model.safetensors")
    text = CONFIGS[kind] if isinstance(CONFIGS[kind], str) else json.dumps(CONFIGS[kind])
    (folder / "adapter_config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    name = "base_model.model.../../escape.lora_A.weight"
    save_file({name: torch.zeros(4, 4)}, folder / "adapter_model.safetensors")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Marks(tmp_path / "ran")))
    began = time.process_time()
    words = tinyrun.arguments(prepared, model_name=str(folder), output_dir=str(tmp_path / "run"))
    assert main([*words, "--preflight"]) == 2
    assert time.process_time() - began < 5
    err = capsys.readouterr().err
    assert "PEFT adapter" in err
    assert "Traceback" not in err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["merge", "export", "bench", "replay"])
def test_an_adapter_s_folder_is_no_run(tmp_path: Path, capsys: Shown, command: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(SOUND), encoding="utf-8")
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Marks(tmp_path / "ran")))
    more = ["--steps", "1"] if command == "replay" else ["--format", "merged"] if command == "export" else []
    assert main([command, str(tmp_path), *more]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "hint: " in err
    assert not (tmp_path / "ran").exists()


def test_a_rank_that_no_memory_holds_is_refused_before_anything_is_made(
    prepared: Path, tmp_path: Path, capsys: Shown
) -> None:
    words = tinyrun.arguments(prepared, output_dir=str(tmp_path / "run"), injection__lora_r=10**9)
    assert main([*words, "--preflight"]) == 2
    assert "error: injection: the adapters' " in capsys.readouterr().err


def test_pickles_beside_safetensors_are_never_read_nor_copied(prepared: Path, tmp_path: Path) -> None:
    base = damage.copy(prepared / "base", tmp_path / "base")
    mark = tmp_path / "ran"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "x.pkl"):
        (base / name).write_bytes(pickle.dumps(Marks(mark)))
    out = tmp_path / "run"
    words = tinyrun.arguments(prepared, model_name=str(base), output_dir=str(out), training__save_steps=1)
    assert main(words) == 0
    damage.removed(out / "final" / "manifest.json")
    for folder in (out, *out.glob("checkpoint-*")):
        for name in ("adapter.bin", "optimizer.pt", "state.pkl"):
            (folder / name).write_bytes(pickle.dumps(Marks(mark)))
    assert main([*words, "--resume"]) == 0
    assert main(["merge", str(out)]) == 0
    assert not mark.exists()
    copied = {path.suffix for path in (out / "merged").iterdir()}
    assert not copied & {".bin", ".pt", ".pth", ".pkl"}


@pytest.mark.parametrize("command", ["merge", "bench"])
def test_a_run_folder_that_turns_on_code_says_so_before_it_runs(
    prepared: Path, tmp_path: Path, capsys: Shown, command: str
) -> None:
    run = damage.copy(prepared / "run", tmp_path / "run")
    path = run / "resolved_config.toml"
    text = path.read_text(encoding="utf-8")
    assert "trust_remote_code = false" in text
    path.write_text(text.replace("trust_remote_code = false", "trust_remote_code = true"), encoding="utf-8")
    main([command, str(run)])
    err = capsys.readouterr().err
    assert f"warning: {path} turns model.trust_remote_code on" in err
