"""Train with the real command, then bench, merge and export: every way to read the result gives the same numbers.

The models are tiny and random; the plugins, the data pipeline and the command line are the real ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from eulerforge.cli.main import main
from eulerforge.config.atomic import sha256_of


def preset(folder: Path, family: str, **changes: str) -> Path:
    """A preset for a tiny model and its rows, both beside it."""
    lines = {
        "phases": "",
        "model": 'load_precision = { mode = "fp32" }',
        "training": "",
        **changes,
    }
    text = f"""
model_name = "{folder / "base"}"
backbone = "{"llama3" if family == "llama" else "qwen3"}"
device = "cpu"
output_dir = "{folder / "run"}"
[model]
{lines["model"]}
[injection]
strategy = "dense_lora"
lora_r = 4
lora_alpha = 8
lora_dropout = 0.05
[injection.attn_lora]
enabled = true
lora_r = 2
[data]
path = "{folder / "rows.jsonl"}"
max_length = 128
[data.validation]
size = 6
[training]
lr = 0.02
max_train_steps = 4
batch_size = 4
save_steps = 2
log_steps = 1
{lines["training"]}
[evaluation]
samples = 1
max_new_tokens = 5
"""
    path = folder / "preset.toml"
    path.write_text(text, encoding="utf-8")
    return path


def trained(folder: Path, family: str = "llama", *, sizes: dict[str, Any] | None = None, **changes: str) -> Path:
    """The folder of a run that the train command finished."""
    tiny.save_tiny(folder / "base", family, **(sizes or {}))
    tiny.write_rows(folder / "rows.jsonl", 24)
    assert main(["train", "--preset", str(preset(folder, family, **changes))]) == 0
    return folder / "run"


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run per family, with tied embeddings for qwen3; tests only read it."""
    folder = tmp_path_factory.mktemp(request.param)
    return trained(folder, request.param, sizes={"tie_word_embeddings": request.param == "qwen3"})


def answer(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """The data of a command that must succeed with ``--json``."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    envelope = json.loads(capsys.readouterr().out)
    assert envelope["ok"] is True
    data: dict[str, Any] = envelope["data"]
    return data


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The error lines of a command that must be refused as a usage error, without a traceback."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert any(line.startswith("error: ") for line in text.splitlines())
    return text


def plain(folder: Path) -> Any:
    """A folder opened by plain transformers, with nothing missing and nothing unexpected."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def plain_loss(model: Any, run: Path) -> float:
    """Mean held-out loss per label token by full logits, one row at a time: the slow reference."""
    from eulerforge.evaluation.bench import held_out_rows
    from eulerforge.export.rundir import locate, open_base
    from eulerforge.plugins import load_registry

    rows = held_out_rows(open_base(locate(run), registry=load_registry()))
    total, count = 0.0, 0
    for index in range(len(rows)):
        ids, labelled = rows.row(index)
        tokens = torch.tensor(ids.astype("int64"))[None]
        with torch.no_grad():
            predicted = model(tokens).logits[0, :-1].float().log_softmax(-1)
        for position in range(1, len(ids)):
            if labelled[position]:
                total -= float(predicted[position - 1, tokens[0, position]])
                count += 1
    return total / count


def test_bench_live_and_plain_transformers_agree(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = answer(capsys, "bench", run)
    live = answer(capsys, "bench", run, "--live")
    answer(capsys, "merge", run, "--output", tmp_path / "merged")
    model = plain(tmp_path / "merged")
    reference = plain_loss(model, run)
    assert (merged["mode"], live["mode"]) == ("merged", "live")
    assert merged["tuned"]["loss"] == pytest.approx(reference, rel=1e-5)
    assert live["tuned"]["loss"] == pytest.approx(reference, rel=1e-5)
    assert merged["base"]["loss"] == pytest.approx(plain_loss(plain(run.parent / "base"), run), rel=1e-5)
    assert merged["tuned"]["loss"] < merged["base"]["loss"]
    assert merged["gain"] > 0
    assert merged["rows"] == 6


def test_bench_agrees_with_what_training_measured_last(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = [
        record
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if any("val" in key or "held" in key for key in record)
    ]
    assert measured
    loss = next(
        value for key, value in measured[-1].items() if ("val" in key or "held" in key) and key.endswith("loss")
    )
    assert answer(capsys, "bench", run)["tuned"]["loss"] == pytest.approx(loss, rel=1e-5)


def test_rows_of_changed_data_are_not_called_held_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that is appended shuffles the split anew: what is held out now was mostly trained on."""
    changed, rows = shutil.copytree(run, tmp_path / "run"), tmp_path / "rows.jsonl"
    rows.write_bytes((run.parent / "rows.jsonl").read_bytes())
    config = changed / "resolved_config.toml"
    config.write_text(config.read_text().replace(str(run.parent / "rows.jsonl"), str(rows)))
    merged = answer(capsys, "merge", changed, "--output", tmp_path / "same")
    assert merged["audit"]["logits"]["source"] == "held-out rows"
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "one more", "response": "row"}) + "\n")
    text = refused(capsys, "bench", changed, "--samples", "0")
    assert "data.validation: " in text
    assert "is not what was" in text
    assert "with --data FILE" in text
    assert answer(capsys, "bench", changed, "--data", rows, "--samples", "0")["rows"] == 25
    merged = answer(capsys, "merge", changed, "--output", tmp_path / "other")
    assert merged["audit"]["logits"]["source"] == "fixed token ids"

    # a version that recorded no hash is believed
    for state in changed.glob("*/state.json"):
        facts = json.loads(state.read_text())
        del facts["identity"]["data.validation"]
        state.write_text(json.dumps(facts))
        manifest = state.with_name("manifest.json")
        told = json.loads(manifest.read_text())
        told["files"][state.name] = {"size": state.stat().st_size, "sha256": sha256_of(state)}
        manifest.write_text(json.dumps(told))
    assert answer(capsys, "bench", changed, "--samples", "0")["rows"] == 6


def test_the_live_model_and_the_export_give_the_same_logits(run: Path, tmp_path: Path) -> None:
    from eulerforge.export.rundir import open_run
    from eulerforge.plugins import load_registry

    assert main(["export", str(run), "--format", "merged", "--output", str(tmp_path / "merged")]) == 0
    ids = torch.tensor([[1, 44, 45, 46, 47, 60]])
    with torch.no_grad():
        live = open_run(run, registry=load_registry()).model(ids).logits
        torch.testing.assert_close(plain(tmp_path / "merged")(ids).logits, live, rtol=1e-5, atol=1e-5)


def test_peft_reads_the_adapter(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    import warnings

    from eulerforge.export.rundir import open_run
    from eulerforge.plugins import load_registry

    answer(capsys, "export", run, "--format", "peft", "--output", tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name that is on its way out
        model = peft.PeftModel.from_pretrained(plain(run.parent / "base"), tmp_path / "adapter").eval()
    ids = torch.tensor([[1, 44, 45, 46, 47, 60]])
    with torch.no_grad():
        live = open_run(run, registry=load_registry()).model(ids).logits
        torch.testing.assert_close(model(ids).logits, live, rtol=1e-5, atol=1e-5)


def test_the_merged_model_has_no_wrapper_left(run: Path) -> None:
    from torch import nn

    from eulerforge.export.rundir import open_run
    from eulerforge.lora.merge import merge_in_place
    from eulerforge.models.linear_ops import linear_ops_from
    from eulerforge.plugins import load_registry

    registry = load_registry()
    model = open_run(run, registry=registry).model
    assert merge_in_place(model, linear_ops_from(registry)) == 3 * 5
    assert type(model.get_submodule("model.layers.0.mlp.gate_proj")) is nn.Linear
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in plain(run.parent / "base").named_parameters()
    }


def test_an_earlier_checkpoint_is_another_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    final = answer(capsys, "bench", run)
    early = answer(capsys, "bench", run, "--checkpoint", "2")
    same = answer(capsys, "bench", run / "checkpoint-2")
    assert (final["step"], early["step"]) == (4, 2)
    assert early["tuned"]["loss"] == same["tuned"]["loss"] != final["tuned"]["loss"]
    answer(capsys, "merge", run, "--checkpoint", "2", "--output", tmp_path / "early")
    assert plain_loss(plain(tmp_path / "early"), run) == pytest.approx(early["tuned"]["loss"], rel=1e-5)


def test_bench_answers_prompts_and_prints_for_people(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = answer(capsys, "bench", run, "--prompt", "Who builds?", "--samples", "2")
    assert len(data["samples"]) == 3
    assert "Who builds?" in data["samples"][0]["prompt"]
    assert data["samples"][0]["reference"] is None
    assert data["samples"][1]["reference"]
    assert main(["bench", str(run)]) == 0
    printed = capsys.readouterr().out
    for word in ("base", "tuned", "perplexity", "tokens/s", "lower than the base's", "prompt:"):
        assert word in printed


def test_bench_measures_other_rows(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny.write_rows(tmp_path / "other.jsonl", 5)
    assert answer(capsys, "bench", run, "--data", rows)["rows"] == 5


def test_an_unfinished_run_gives_its_newest_checkpoint_and_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "final")
    newest = max(int(path.name.removeprefix("checkpoint-")) for path in copy.glob("checkpoint-*"))
    capsys.readouterr()
    assert main(["bench", str(copy), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["data"]["step"] == newest
    assert f"checkpoint-{newest} is used" in captured.err


def test_a_damaged_checkpoint_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "final" / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "adapter.safetensors" in refused(capsys, "bench", copy)
    assert "adapter.safetensors" in refused(capsys, "merge", copy)


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no run folder" in refused(capsys, "bench", tmp_path / "absent")
    assert "is no run" in refused(capsys, "merge", tmp_path)
    assert "has no checkpoint-77" in refused(capsys, "bench", run, "--checkpoint", "77")
    assert "is a checkpoint already" in refused(capsys, "bench", run / "final", "--checkpoint", "2")
    assert "--dtype" in refused(
        capsys, "export", run, "--format", "peft", "--dtype", "bf16", "--output", tmp_path / "adapter"
    )


def test_merge_writes_into_the_run_and_never_over_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = answer(capsys, "merge", run)
    assert Path(data["folder"]) == run / "merged"
    assert data["tensors"] == 15
    assert "exists already" in refused(capsys, "merge", run)
    assert answer(capsys, "merge", run, "--overwrite")["tensors"] == 15
    assert "no export of ours" in refused(capsys, "merge", run, "--output", run.parent / "base", "--overwrite")
    assert "overlap" in refused(capsys, "merge", run, "--output", run.parent / "base" / "inside")
    plain(run / "merged")


def test_a_sharded_base_a_wanted_dtype_and_trained_base_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    tiny.tiny_model("llama").save_pretrained(base, max_shard_size="20KB")
    tiny.tiny_tokenizer().save_pretrained(base)
    tiny.write_rows(tmp_path / "rows.jsonl", 24)
    path = preset(
        tmp_path,
        "llama",
        training='[[training.phases]]\nstep = 0\ntrainable = ["lora", "attn_lora", "base_ffn"]',
    )
    assert main(["train", "--preset", str(path)]) == 0
    run = tmp_path / "run"
    merged = answer(capsys, "bench", run)
    live = answer(capsys, "bench", run, "--live")
    data = answer(capsys, "merge", run)
    assert sum(name.endswith(".safetensors") for name in data["files"]) > 2
    reference = plain_loss(plain(run / "merged"), run)
    assert merged["tuned"]["loss"] == pytest.approx(reference, rel=1e-5)
    assert live["tuned"]["loss"] == pytest.approx(reference, rel=1e-5)
    answer(capsys, "merge", run, "--output", tmp_path / "half", "--dtype", "bf16")
    half = plain(tmp_path / "half")
    assert next(half.parameters()).dtype == torch.bfloat16
    assert plain_loss(half, run) == pytest.approx(reference, rel=2e-2)
    assert "trained" in refused(capsys, "export", run, "--format", "peft", "--output", tmp_path / "adapter")
