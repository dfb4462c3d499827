"""Real runs of every family: packed, in bins, bucketed and with checkpointing, they train the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tinyrun

from eulerforge.cli.main import main
from eulerforge.lora.wrap import adapted_modules, unwrap
from eulerforge.plugins import load_registry
from eulerforge.testing.tiny_models import save_tiny, tiny_model

FAMILIES = ["llama3", "qwen3", "qwen3_5", "gemma3", "mixtral", "qwen3_5_multimodal", "gemma3_multimodal"]
CUTS: dict[str, dict[str, Any]] = {
    "flat": {"data__packing": "flat"},
    "flat, small parts": {"data__packing": "flat", "training__tokens_per_micro_batch": 70},
    "bins": {"data__packing": "bins"},
    "off": {"data__packing": "off"},
    "flat, checkpointing": {"data__packing": "flat", "training__gradient_checkpointing": True},
}


def folder_of(family: str, folder: Path) -> Path:
    save_tiny(folder / "base", family)
    tinyrun.tiny.write_rows(folder / "rows.jsonl", 24)
    return folder


def run_of(folder: Path, **changes: Any) -> Any:
    settings = {
        "backbone": "auto",
        "injection__allow_partial": True,
        "training__batch_size": 4,
        "training__grad_accum_steps": 2,
        "output_dir": str(folder / f"run-{len(list(folder.iterdir()))}"),
        **changes,
    }
    return tinyrun.assembled(folder, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cut_trains_alike(family: str, tmp_path: Path) -> None:
    folder_of(family, tmp_path)
    seen: dict[str, list[dict[str, Any]]] = {}
    for name, changes in CUTS.items():
        run = run_of(tmp_path, injection__target_keywords=["o_proj", "q_proj"], **changes)
        assert run.layout.packing == changes["data__packing"]
        assert run.isolation.reason == ""
        tinyrun.train_steps(run, 3)
        seen[name] = tinyrun.metrics(run.out)
    plain = seen.pop("off")
    assert len({row["label_tokens"] for row in plain}) > 1
    for name, rows in seen.items():
        assert [row["label_tokens"] for row in rows] == [row["label_tokens"] for row in plain], name
        assert rows[0]["loss"] == pytest.approx(plain[0]["loss"], abs=1e-5), name
        assert rows[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-4), name
        # later steps differ by what Adam makes of the first one's rounding
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in plain], abs=1e-3), name


def test_checkpoints_of_linear_attention_keep_their_names_and_unwrap_gives_the_base_back(tmp_path: Path) -> None:
    folder_of("qwen3_5", tmp_path)
    run = run_of(tmp_path)
    assert run.isolation.mixers == 2
    paths = [path for path, _ in adapted_modules(run.model) if "linear_attn" in path]
    run.isolation.remove()
    unwrap(run.model)
    base = tiny_model("qwen3_5")
    assert list(run.model.state_dict()) == list(base.state_dict())
    assert all(path.split(".")[-2] == "linear_attn" for path in paths)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.model.modules())


def test_the_tutorials_qwen3_on_a_qwen3_5_model_is_isolated_by_the_family_that_knows_it(tmp_path: Path) -> None:
    folder_of("qwen3_5", tmp_path)
    run = run_of(tmp_path, backbone="qwen3")
    assert (run.layout.packing, run.isolation.mixers) == ("flat", 2)


def test_without_that_family_it_is_padded_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of("qwen3_5", tmp_path)
    words = tinyrun.arguments(tmp_path, backbone="qwen3", training__max_train_steps=1)
    assert main([*words, "--no-plugin", "qwen3.5"]) == 0
    assert "rows are padded, sorted by length: backbone qwen3 knows this model in part" in capsys.readouterr().err
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    assert receipt["packing"]["packing"] == "off"


def test_a_run_says_and_records_how_it_packs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of("llama3", tmp_path)
    assert main(tinyrun.arguments(tmp_path, backbone="auto", training__max_train_steps=1)) == 0
    said = capsys.readouterr().err
    assert "rows are packed (flat); attention: matrix products per document" in said
    assert "from a row's last label on nothing is computed: " in said
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    assert receipt["packing"]["attention"] == "matrix products per document"
    assert receipt["packing"]["leak"] < 1e-6
    assert receipt["packing"]["token_budget"] == 256


def test_preflight_shows_the_proof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of("gemma3", tmp_path)
    assert main([*tinyrun.arguments(tmp_path, backbone="gemma3"), "--preflight", "--json"]) == 0
    packing = json.loads(capsys.readouterr().out)["data"]["packing"]
    assert packing["packing"] == "flat"
    assert packing["leak"] < 1e-6
    assert packing["share_prefixes"] is True
    whole = tinyrun.arguments(tmp_path, backbone="gemma3", data__share_prefixes=False)
    assert main([*whole, "--preflight", "--json"]) == 0
    without = json.loads(capsys.readouterr().out)["data"]["packing"]
    assert main(whole) == 0
    largest = max(row["tokens"] for row in tinyrun.metrics(tmp_path / "run") if "tokens" in row)
    # from a row's last label on nothing is computed
    assert packing["largest_micro_batch"] < without["largest_micro_batch"] < largest


def test_a_prefix_that_rows_share_changes_no_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of("llama3", tmp_path)
    rows = {}
    for share in (True, False):
        out = tmp_path / f"run-{share}"
        words = tinyrun.arguments(
            tmp_path, backbone="llama3", output_dir=str(out), data__share_prefixes=share, injection__lora_dropout=0.0
        )
        assert main(words) == 0
        assert ("prefixes that rows share are computed once" in capsys.readouterr().err) == share
        rows[share] = [row for row in tinyrun.metrics(out) if "grad_norm" in row]
    for shared, whole in zip(rows[True], rows[False], strict=True):
        assert (shared["tokens"], shared["label_tokens"]) == (whole["tokens"], whole["label_tokens"])
        assert shared["loss"] == pytest.approx(whole["loss"], abs=1e-5 if whole["step"] == 1 else 1e-3)
    assert rows[True][0]["grad_norm"] == pytest.approx(rows[False][0]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("packing", ["flat", "bins", "off"])
def test_a_resumed_run_computes_what_an_uninterrupted_one_does(packing: str, tmp_path: Path) -> None:
    folder_of("llama3", tmp_path)
    settings = {
        "backbone": "llama3",
        "data__packing": packing,
        "injection__lora_dropout": 0.3,
        "training__batch_size": 4,
        "training__grad_accum_steps": 2,
        "training__tokens_per_micro_batch": 120,
        "training__save_steps": 2,
    }
    whole = {**settings, "output_dir": str(tmp_path / "whole")}
    assert main(tinyrun.arguments(tmp_path, **whole)) == 0
    assert main(tinyrun.arguments(tmp_path, **settings)) == 0
    for name in ("checkpoint-4", "final"):
        shutil.rmtree(tmp_path / "run" / name)
    assert main([*tinyrun.arguments(tmp_path, **settings), "--resume"]) == 0
    for file in tinyrun.FILES:
        one, other = (tmp_path / name / "checkpoint-4" / file for name in ("whole", "run"))
        assert one.read_bytes() == other.read_bytes()
    assert tinyrun.metrics(tmp_path / "whole") == tinyrun.metrics(tmp_path / "run")


def test_every_first_party_backbone_declares_how_it_isolates() -> None:
    registry = load_registry()
    kinds = {"llama": "attention", "qwen3": "attention", "qwen3_moe": "attention", "gemma3": "attention",
             "mixtral": "attention", "qwen3_5": "gather", "qwen3_5_moe": "gather"}  # fmt: skip
    for kind, how in kinds.items():
        spec = registry.backbone_for(kind)
        assert spec is not None
        assert spec.isolation == how
