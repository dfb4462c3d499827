"""A loss or a gradient that is not finite never reaches the weights, and its rows are named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinyrun
import torch
from safetensors.torch import load_file

from eulerforge.cli.main import main
from eulerforge.training import loop

SETTINGS: dict[str, Any] = {
    "training__max_train_steps": 5,
    "training__save_steps": 1,
    "training__threads": 1,
    "training__grad_accum_steps": 2,
    "data__packing": "off",  # one micro-batch per batch_size rows: the test knows which ones
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinyrun.prepare(tmp_path_factory.mktemp("prepared"))


def spoilt(calls: set[int], value: float, where: str) -> Callable[..., Any]:
    """The loss function; the n-th calls give a loss, or a gradient, of ``value``."""
    real, seen = loop.label_token_loss, [0]

    def call(*args: Any, **options: Any) -> Any:
        seen[0] += 1
        loss, count = real(*args, **options)
        if seen[0] not in calls:
            return loss, count
        if where == "loss":
            return loss * value, count
        loss.register_hook(lambda gradient: gradient * value)
        return loss, count

    return call


def arguments(prepared: Path, out: Path, **changes: Any) -> list[str]:
    return tinyrun.arguments(prepared, **{**SETTINGS, "output_dir": str(out), **changes})


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_it_stops_before_the_update_and_names_step_and_rows(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    value: float,
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(loop, "label_token_loss", spoilt({6}, value, where))  # the second half of step 3
        assert main(arguments(prepared, out)) == 1
    shown = capsys.readouterr().err
    (error,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert f"the {where} of step 3 is " in error
    # the loss is known per micro-batch of 2 rows, the gradient per step of 4
    assert error.count("rows.jsonl:") == (2 if where == "loss" else 4)
    assert "Traceback" not in shown
    newest = max(out.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert newest.name == "checkpoint-2"
    for name in tinyrun.FILES:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(newest / name).values())
    straight = tmp_path / "straight"
    assert main([*arguments(prepared, out), "--resume"]) == 0
    assert main(arguments(prepared, straight)) == 0
    assert (out / "final/adapter.safetensors").read_bytes() == (straight / "final/adapter.safetensors").read_bytes()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_skip_leaves_the_step_out_counts_it_and_touches_nothing(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(loop, "label_token_loss", spoilt({5}, math.nan, where))
        assert main(arguments(prepared, out, training__on_nonfinite="skip")) == 0
    assert "warning: step 3 was left out: the " in capsys.readouterr().err
    rows = [row for row in tinyrun.metrics(out) if "loss" in row]
    assert [row["step"] for row in rows if row.get("skipped")] == [3]
    (skipped,) = [row for row in rows if row.get("skipped")]
    assert (skipped["loss"], skipped["grad_norm"], skipped["skips"]) == (None, None, 1)
    assert len(skipped["rows"]) == (2 if where == "loss" else 4)
    assert all("rows.jsonl:" in row for row in skipped["rows"])
    for name in tinyrun.FILES:
        assert (out / "checkpoint-2" / name).read_bytes() == (out / "checkpoint-3" / name).read_bytes()
    assert json.loads((out / "final" / "state.json").read_text())["skipped"] == 1
    assert "NaN" not in (out / "metrics.jsonl").read_text()


def test_skips_are_bounded_over_the_whole_run(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = arguments(prepared, out, training__on_nonfinite="skip", training__max_skipped_steps=2)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "label_token_loss", spoilt({1, 3, 5}, math.nan, "gradient"))
        assert main(words) == 1
    assert "the gradient of step 3 is nan" in (shown := capsys.readouterr().err)
    assert "2 steps were left out before it, and training.max_skipped_steps allows no more" in shown
    with monkeypatch.context() as patched:  # a resume does not begin to count anew
        patched.setattr(loop, "label_token_loss", spoilt({1}, math.nan, "gradient"))
        assert main([*words, "--resume"]) == 1
    assert main([*words, "--resume"]) == 0


def test_an_update_that_overflows_is_never_saved(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(arguments(prepared, out, training__lr=3e38, training__warmup_steps=0)) == 1
    shown = capsys.readouterr().err
    assert "is not finite" in shown or " is nan" in shown or " is inf" in shown
    for folder in out.glob("checkpoint-*"):
        for name in tinyrun.FILES:
            assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(folder / name).values())


def test_running_out_of_memory_in_a_step_says_what_to_lower(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")

    monkeypatch.setattr(loop, "label_token_loss", out_of_memory)
    assert main(arguments(prepared, tmp_path / "run")) == 1
    shown = capsys.readouterr().err
    (error,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: out of memory: CUDA out of memory. Tried to allocate 20.00 GiB.")
    hint = shown.splitlines()[-1]
    for words in (
        "training.batch_size=1",
        "training.grad_accum_steps=4",
        "data.max_length (now 128)",
        "lora_r (now 4)",
    ):
        assert words in hint


def test_a_layer_of_a_plugin_that_raises_mid_run_is_named(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """dense_lora's plugin stands for a third party's: its distribution is found through the traceback."""
    import eulerforge_strategy_dense_lora.injection as plugin

    namespace: dict[str, Any] = {"__name__": plugin.__name__, "real": loop.label_token_loss, "calls": [0]}
    source = (
        "def forward(*args, **options):\n    calls[0] += 1\n"
        "    if calls[0] == 4:\n        raise ValueError('the third party forgot\\nsomething')\n"
        "    return real(*args, **options)\n"
    )
    exec(compile(source, "injection.py", "exec"), namespace)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "label_token_loss", namespace["forward"])
        assert main(arguments(prepared, tmp_path / "run")) == 3
    shown = capsys.readouterr().err
    (error,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert "plugin eulerforge-strategy-dense-lora:dense_lora " in error
    assert " raised ValueError in step 2: the third party forgot (" in error
    assert main([*arguments(prepared, tmp_path / "run"), "--resume"]) == 0
