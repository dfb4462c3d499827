"""Putting a run together: the cheap checks first, and torch set up as the preset asks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tinyrun
import torch

from eulerforge.errors import DataError, UsageError
from eulerforge.training import assemble as room
from eulerforge.training.layouts import rope_by_length
from eulerforge.training.memory import KeptForBackward


@pytest.fixture(autouse=True)
def _torch_as_before() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def test_wrong_data_is_found_before_the_model_is_loaded(
    make_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "no answer"}\n')
    monkeypatch.setattr(room, "load_model", lambda *_, **__: pytest.fail("the model was loaded first"))
    with pytest.raises(DataError, match="is missing"):
        make_run(data__path=str(path))


@pytest.mark.parametrize(("size", "fits"), [("", True), ("1", True), ("2", False), ("8", False)])
def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, size: str, fits: bool) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    if fits:
        room.refuse_many_processes()
    else:
        with pytest.raises(UsageError, match=f"WORLD_SIZE is {size}"):
            room.refuse_many_processes()


def test_what_was_read_and_what_is_risky_is_said(prepared: Path, tmp_path: Path) -> None:
    from eulerforge.plugins import load_registry

    said: list[str] = []
    config = tinyrun.loaded(
        prepared,
        data__validation__size=4,
        model__load_precision__mode="fp16",
        model__load_precision__compute_dtype="fp16",
    ).run
    run = room.assemble(config, load_registry(), out=tmp_path, say=said.append)
    assert any("24 rows read" in line for line in said)
    assert (len(run.datasets.train), len(run.datasets.validation)) == (20, 4)
    assert run.dtype == torch.float16
    assert any("fp16 gradients can underflow" in warning for warning in run.warnings)
    assert {parameter.dtype for parameter in run.model.parameters() if parameter.requires_grad} <= {torch.float32}


def test_threads_and_determinism(make_run: Callable[..., Any]) -> None:
    make_run(training__threads=1, training__deterministic=True)
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()


def test_the_evaluation_batch_is_the_training_batch_unless_it_is_named(make_run: Callable[..., Any]) -> None:
    assert make_run(training__batch_size=3).eval_batch_size == 3
    assert make_run(training__batch_size=3, evaluation__batch_size=7).eval_batch_size == 7


def test_gradient_checkpointing_keeps_less_and_computes_the_same(make_run: Callable[..., Any]) -> None:
    from eulerforge.data.batches import collate
    from eulerforge.training.forward import label_token_loss
    from eulerforge.training.phases import enter_phase

    kept, gradients = [], []
    for checkpointing in (False, True):
        run = make_run(training__gradient_checkpointing=checkpointing)
        tinyrun.randomize_B(run)
        trainable = enter_phase(run.model.train(), run.phases, run.phases.at(0))
        counter = KeptForBackward(run.model)
        with counter.hooks():
            loss, _ = label_token_loss(run.model, collate(run.datasets.train, range(8), run.pad_id, run.device))
        kept.append(counter.bytes)
        loss.backward()
        gradients.append([parameter.grad for parameter in trainable])
    assert kept[1] < kept[0] / 2
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("kind", "longest", "packed"), [("dynamic", 64, True), ("dynamic", 65, False), ("yarn", 65, True)]
)
def test_frequencies_that_follow_the_longest_row_are_not_packed(kind: str, longest: int, packed: bool) -> None:
    text = SimpleNamespace(
        rope_parameters={"full_attention": {"rope_type": kind, "factor": 2.0}}, max_position_embeddings=64
    )
    found = rope_by_length(SimpleNamespace(get_text_config=lambda: text), longest)
    assert (found == "") == packed
    assert packed or "data.max_length=64" in found


def test_a_run_with_such_frequencies_says_that_it_pads(tmp_path: Path) -> None:
    from eulerforge.plugins import load_registry

    tinyrun.prepare(tmp_path)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    change_config(tmp_path, rope_parameters=rope, max_position_embeddings=64)
    said: list[str] = []
    run = room.assemble(tinyrun.loaded(tmp_path).run, load_registry(), out=tmp_path / "run", say=said.append)
    assert run.layout.packing == "off"
    assert any("rows are padded, sorted by length: its rotary embedding (dynamic) follows" in line for line in said)


def test_a_loss_of_routers_that_is_not_added_is_said(tmp_path: Path) -> None:
    from eulerforge.plugins import load_registry

    tinyrun.prepare(tmp_path, "mixtral")
    change_config(tmp_path, output_router_logits=True)
    run = room.assemble(tinyrun.loaded(tmp_path, backbone="auto").run, load_registry(), out=tmp_path / "run")
    assert any("load-balancing loss" in warning for warning in run.warnings)
