"""receipt.json: enough to make the run again, and the same for two runs that are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eulerforge.plugins import load_registry
from eulerforge.training.receipt import base_weights, make_receipt, read_receipt


def receipt(run: Any, run_id: str = "a") -> dict[str, Any]:
    return make_receipt(run, load_registry(), base_weights(run.source.folder), run_id)


def test_it_names_what_the_run_is_made_of(make_run: Callable[..., Any]) -> None:
    import torch

    run = make_run(data__validation__size=4)
    facts = receipt(run)
    assert json.loads(json.dumps(facts)) == facts, "it is plain JSON"
    assert facts["libraries"]["torch"] == torch.__version__
    assert (facts["backbone"], facts["strategy"], facts["seed"]) == ("llama3", "dense_lora", 42)
    assert (facts["dtype"], facts["device"]) == ("fp32", "cpu")
    assert {plugin["distribution"] for plugin in facts["plugins"]} >= {
        "eulerforge-backbone-llama3", "eulerforge-strategy-dense-lora", "eulerforge-phases",
    }  # fmt: skip
    assert facts["data"]["train_sha256"] != facts["data"]["validation_sha256"]
    assert facts["data"]["report"]["train_rows"] == 20
    weights = run.source.folder / "model.safetensors"
    assert facts["base"]["files"]["model.safetensors"] == {
        "size": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def test_two_equal_runs_have_equal_receipts_and_another_seed_shows(make_run: Callable[..., Any]) -> None:
    first = receipt(make_run())
    assert first == receipt(make_run(data__cache=False)), "where the tokens come from plays no part"
    other = receipt(make_run(seed=1), "b")
    assert {key for key in first if first[key] != other[key]} == {"run_id", "seed"}


def test_one_bit_of_the_weights_or_one_file_more_is_another_base(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x00\x01")
    (tmp_path / "README.md").write_text("not a weight")
    (tmp_path / "config.json").write_text("{}")
    first = base_weights(tmp_path)
    # another tool may fetch a second form of the weights into the hub's cache
    (tmp_path / "consolidated.safetensors").write_bytes(b"the same in another form")
    assert base_weights(tmp_path) == first
    assert list(first["files"]) == ["a.safetensors"]
    (tmp_path / "a.safetensors").write_bytes(b"\x00\x00")
    second = base_weights(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"")
    assert len({first["sha256"], second["sha256"], base_weights(tmp_path)["sha256"]}) == 3
    (tmp_path / "config.json").write_text('{"rope_theta": 1}')
    assert base_weights(tmp_path)["config_sha256"] != second["config_sha256"] == first["config_sha256"]


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_a_receipt_that_cannot_be_read_is_empty(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "receipt.json").write_text(content)
    assert read_receipt(tmp_path) == {}
