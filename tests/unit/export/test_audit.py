"""The measures of an export against float64 references, and every refusal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file

from eulerforge.errors import RunError
from eulerforge.export import merged
from eulerforge.export.audit import ExportAudit, LayerAudit, LogitsAudit
from eulerforge.export.basefiles import read_base_files
from eulerforge.export.destination import RECEIPT
from eulerforge.export.measure import audit_changes, compare_logits
from eulerforge.export.merged import changes_of, write_merged
from eulerforge.export.peft_adapter import write_peft
from eulerforge.export.rundir import TrainedRun
from eulerforge.lora.experts import LoRAExperts
from eulerforge.lora.wrap import adapted_modules

MakeRun = Callable[..., TrainedRun]


def layers_of(run: TrainedRun, dtype: torch.dtype | None = None) -> dict[str, LayerAudit]:
    base = read_base_files(run.source.folder)
    return {layer.name: layer for layer in audit_changes(changes_of(run), base, lambda own: dtype or own)}


def first_layer(run: TrainedRun) -> Any:
    return next(iter(adapted_modules(run.model)))[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sizes_and_the_lost_share_equal_a_float64_reference(make_run: MakeRun, dtype: torch.dtype) -> None:
    run = make_run()
    base, found = load_file(run.source.folder / "model.safetensors"), layers_of(run, dtype)
    assert len(found) == 9
    for path, layer in adapted_modules(run.model):
        weight = base[f"{path}.weight"]
        delta = (layer.lora_B.detach().double() @ layer.lora_A.detach().double()) * 2
        held = (weight.double() + delta).float().to(dtype).double() - weight.to(dtype).double()
        audit = found[f"{path}.weight"]
        assert audit.delta_norm == pytest.approx(float(delta.norm()), rel=1e-6)
        assert (
            audit.ratio == audit.largest_ratio == pytest.approx(float(delta.norm() / weight.double().norm()), rel=1e-6)
        )
        assert audit.lost == pytest.approx(float((held - delta).norm() / delta.norm()), rel=1e-2, abs=2e-7)


@pytest.mark.parametrize(("size", "lost"), [(0.0005, 0.90), (0.005, 0.32), (0.015, 0.11)])
def test_a_bf16_merge_loses_what_was_measured_before(make_run: MakeRun, size: float, lost: float) -> None:
    run = make_run(dtype=torch.bfloat16)
    base = load_file(run.source.folder / "model.safetensors")
    for path, layer in adapted_modules(run.model):
        layer.lora_B.data *= size * base[f"{path}.weight"].float().norm() / layer.delta().norm()
    audit = ExportAudit(layers=tuple(layers_of(run).values()))
    assert all(layer.ratio == pytest.approx(size, rel=1e-3) for layer in audit.layers)
    assert audit.lost == pytest.approx(lost, abs=0.03)
    assert audit.dtype == "bf16"
    assert not audit.problems
    assert bool(audit.warnings) == (lost > 0.25)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_measured_one_by_one(make_family_run: MakeRun, family: str) -> None:
    run = make_family_run(family)
    path, experts = next((p, m) for p, m in adapted_modules(run.model) if isinstance(m, LoRAExperts))
    experts.gate_up_proj.lora_B.data[1] = 0
    experts.gate_up_proj.lora_B.data[2] *= 1000
    weight = experts.base_layer.gate_up_proj.double()
    path_of = experts.paths["gate_up_proj"]
    delta = (path_of.lora_B.detach().double() @ path_of.lora_A.detach().double()) * path_of.scaling
    audit = layers_of(run)[f"{path}.gate_up_proj"]
    assert audit.delta_norm == pytest.approx(float(delta.norm()), rel=1e-6)
    assert audit.base_norm == pytest.approx(float(weight.norm()), rel=1e-6)
    assert audit.largest_ratio == pytest.approx(float(delta[2].norm() / weight[2].norm()), rel=1e-6)
    assert (audit.untouched_experts, audit.untouched, audit.exploding) == (1, False, True)


def test_trained_base_values_count_as_part_of_the_update(make_run: MakeRun) -> None:
    run = make_run()
    name = "model.layers.0.self_attn.q_proj.weight"
    old = load_file(run.source.folder / "model.safetensors")[name]
    layer = first_layer(run)
    run = attrs.evolve(run, trained_base={name: old + 0.01})
    want = 0.01 + layer.delta()
    assert layers_of(run)[name].delta_norm == pytest.approx(float(want.norm()), rel=1e-5)
    layer.lora_B.data.zero_()
    assert layers_of(run)[name].untouched


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda b: b[0, 0].fill_(math.nan), "the adapter holds NaN or infinite values"),
        (lambda b: b[0, 0].fill_(math.inf), "the adapter holds NaN or infinite values"),
        (lambda b: b.zero_(), "the adapter was never trained"),
        (lambda b: b.mul_(1e3), "times as large as the weight"),
    ],
    ids=["nan", "inf", "untouched", "exploding"],
)
def test_a_bad_adapter_is_published_by_force_alone(
    make_run: MakeRun, tmp_path: Path, spoil: Callable[[torch.Tensor], Any], words: str
) -> None:
    run = make_run()
    spoil(first_layer(run).lora_B.data)
    for number, write in enumerate((write_merged, write_peft)):
        out = tmp_path / f"out{number}"
        with pytest.raises(RunError, match=words) as caught:
            write(run, out)  # type: ignore[operator]
        (problem,) = caught.value.problems
        assert problem.message.startswith("model.layers.0.self_attn.q_proj.weight: ")
        assert "--force" in str(problem.hint)
        assert not out.exists()
        write(run, out, force=True)  # type: ignore[operator]
        text = (out / RECEIPT).read_text()
        assert "NaN" not in text.replace("holds NaN", "")
        assert "Infinity" not in text
        assert words in json.loads(text)["audit"]["forced"][0]


def test_only_the_first_layers_are_named(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    for _, layer in adapted_modules(run.model):
        layer.lora_B.data.zero_()  # type: ignore[union-attr,operator]
    with pytest.raises(RunError) as caught:
        write_merged(run, tmp_path / "out")
    assert len(caught.value.problems) == 6
    assert caught.value.problems[-1].message == "4 more layers are refused"


def test_an_update_that_rounding_takes_whole_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(dtype=torch.bfloat16)
    for _, layer in adapted_modules(run.model):
        layer.lora_B.data *= 1e-7  # type: ignore[operator]
    with pytest.raises(RunError, match="of the update is lost to rounding as bf16") as caught:
        write_merged(run, tmp_path / "out")
    assert "--dtype fp32" in str(caught.value.problems[0].hint)
    assert write_merged(run, tmp_path / "out", dtype="fp32").audit.lost < 0.5  # type: ignore[operator]


def test_logits_equal_a_float64_reference() -> None:
    random = torch.Generator().manual_seed(1)
    ours, theirs = (torch.randn(2, 6, 11, generator=random) for _ in range(2))
    rows = [torch.arange(6)[None], torch.arange(4)[None]]

    def answering(logits: torch.Tensor) -> Any:
        turns = iter((logits[:1], logits[1:, :4]))
        model = lambda input_ids, use_cache: SimpleNamespace(logits=next(turns))  # noqa: E731
        return type("Model", (), {"device": "cpu", "__call__": lambda self, **words: model(**words)})()

    found = compare_logits(answering(ours), answering(theirs), rows, "held-out rows")
    p, q = (torch.cat([x[0], x[1, :4]]).double() for x in (ours, theirs))
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    assert found.kl == pytest.approx(float(kl), rel=1e-6)
    assert found.top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert found.largest_difference == pytest.approx(float((p - q).abs().max()))
    assert found.tokens == 10


@pytest.mark.parametrize(
    ("kl", "top1", "quantized", "refused"),
    [
        (0.09, 0.81, False, False),
        (0.11, 0.99, False, True),
        (0.01, 0.79, False, True),
        (0.9, 0.6, True, False),
        (1.1, 0.9, True, True),
        (0.1, 0.4, True, True),
        (math.inf, 1.0, True, True),
    ],
)
def test_the_limits_of_the_logits(kl: float, top1: float, quantized: bool, refused: bool) -> None:
    logits = LogitsAudit(kl=kl, top1=top1, largest_difference=1.0, tokens=9, source="held-out rows")
    audit = ExportAudit(layers=(), quantized=quantized, logits=logits)
    assert bool(audit.problems) == refused
    if refused:
        with pytest.raises(RunError, match="the merged model is not the one that was trained"):
            audit.refuse(force=False)
    audit.refuse(force=True)


def test_a_folder_that_computes_something_else_never_appears(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, verify = make_run(), merged.verify_loads

    def of_another(folder: Path, **words: Any) -> Any:
        model = verify(folder, **words)
        model.lm_head.weight.data.mul_(-40)
        return model

    monkeypatch.setattr(merged, "verify_loads", of_another)
    with pytest.raises(RunError, match="the merged model is not the one that was trained"):
        write_merged(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert write_merged(run, tmp_path / "out", force=True).audit.problems


def test_the_receipt_holds_the_measures(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    written = write_merged(run, tmp_path / "out")
    audit = json.loads((tmp_path / "out" / RECEIPT).read_text())["audit"]
    assert audit == json.loads(json.dumps(written.audit.to_json()))
    assert audit["logits"]["source"] == "fixed token ids"
    assert audit["logits"]["kl"] < 1e-6
    assert audit["logits"]["top1"] == 1
    assert audit["forced"] == []
    assert {layer["dtype"] for layer in audit["layers"]} == {"fp32"}
    assert write_merged(run, tmp_path / "unread", verify=False).audit.logits is None


def test_the_limit_of_an_exploding_layer_parts_what_learnt_from_what_diverged() -> None:
    """The largest update that was measured of each (docs/howto/resume_merge_export.md)."""
    largest = {0.0034: False, 0.024: False, 0.36: False, 6.3: True, 121.0: True}
    for ratio, exploding in largest.items():
        layer = LayerAudit(name="w", delta_norm=ratio, base_norm=1.0, largest_ratio=ratio)
        assert layer.exploding is exploding
        assert (layer.problem() is not None) is exploding
