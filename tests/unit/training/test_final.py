"""final/: the adapters, and the whole state dict under the tutorial's keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tinyrun
import torch
from safetensors.torch import load_file

from eulerforge.errors import RunError
from eulerforge.training import diskroom
from eulerforge.training import final as room
from eulerforge.training.final import refuse_no_room, save_final
from eulerforge.training.manifest import TrainState, verify

FULL = "model_with_adapters.safetensors"


def save(run: Any, **options: Any) -> Path:
    return save_final(
        run.out,
        TrainState(step=4),
        run.model,
        run.report,
        run.phases.trained_names,
        **{"include_base": True, **options},
    )


def test_the_state_dict_is_there_to_the_bit(make_run: Callable[..., Any]) -> None:
    run = make_run()
    folder = save(run)
    assert verify(folder)["kind"] == "final"
    found, want = load_file(folder / FULL), run.model.state_dict()
    assert set(found) == set(want)
    assert all(torch.equal(found[name], want[name]) for name in want)
    for name in ("base_layer.weight", "lora_A", "lora_B"):
        assert f"model.layers.2.mlp.gate_proj.{name}" in found
        assert f"model.layers.2.self_attn.v_proj.{name}" in found
    assert not (folder / "config.json").exists(), "transformers must not take it for a model"


def test_without_the_base_only_what_trained(make_run: Callable[..., Any]) -> None:
    run = make_run()
    folder = save(run, include_base=False)
    assert {path.name for path in folder.iterdir()} == {"adapter.safetensors", "state.json", "manifest.json"}
    assert set(load_file(folder / "adapter.safetensors")) == set(run.phases.trained_names)


def test_shards_have_an_index_and_hold_every_tensor_once(make_run: Callable[..., Any]) -> None:
    run = make_run()
    folder = save(run, max_shard="20KB")
    shards = sorted(folder.glob("model_with_adapters-*.safetensors"))
    assert len(shards) > 1
    index = json.loads((folder / f"{FULL}.index.json").read_text())["weight_map"]
    names = [name for shard in shards for name in load_file(shard)]
    assert sorted(names) == sorted(index) == sorted(run.model.state_dict())
    assert set(verify(folder)["files"]) >= {shard.name for shard in shards}


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    tinyrun.prepare(tmp_path, "qwen3", tie_word_embeddings=True)
    run = tinyrun.assembled(tmp_path, "qwen3")
    found = load_file(save(run) / FULL)
    tied = {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(tied & set(found)) == 1
    assert set(run.model.state_dict()) - set(found) <= tied


def test_a_full_disk_names_the_way_out(make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    run = make_run()
    monkeypatch.setattr(room, "save_torch_state_dict", full)
    with pytest.raises(RunError, match="No space left") as failed:
        save(run)
    assert "checkpoint.include_base=false" in (failed.value.problems[0].hint or "")
    assert list(run.out.iterdir()) == []


@pytest.mark.parametrize("include_base", [True, False])
def test_a_final_that_will_not_fit_is_known_before_the_run_trains(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, include_base: bool
) -> None:
    run = make_run()
    needed = sum(file.stat().st_size for file in save(run, include_base=include_base).glob("*.safetensors"))
    for free, fits in ((needed + 2 * diskroom.SLACK_BYTES, True), (needed - 4096, False)):
        monkeypatch.setattr(diskroom.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        ask = partial(refuse_no_room, run.out, run.model, run.phases.trained_names, include_base=include_base)
        if fits:
            ask()
            continue
        with pytest.raises(RunError, match="was not written") as failed:
            ask()
        assert "checkpoint.include_base=false" in str(failed.value.problems[0].hint)
