"""The whole fast path against its slow reference, for every backbone, without dropout and with seeded dropout.

Fast: packed documents, one of them a prefix that all share where that is done, attention per document, one product per
adapted layer, masks from bits, norms in one pass, the loss in chunks; fp32. Slow: the same row with a dense mask, plain
products, the modules' own norms, full logits; float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tinyrun
import torch
import torch.nn.functional as F

from eulerforge.data.batches import BatchPlan
from eulerforge.lora.dropout import draw_seed, keep_mask, keep_share
from eulerforge.lora.linear import LoRALinear
from eulerforge.testing.tiny_models import save_tiny
from eulerforge.training import attention
from eulerforge.training.forward import hidden_states, label_token_loss
from eulerforge.training.loop import micro_batch_seed
from eulerforge.training.phases import enter_phase

BACKBONES = {
    "llama3": ["gate_proj", "up_proj", "down_proj", "q_proj", "v_proj"],
    "qwen3": ["gate_proj", "up_proj", "down_proj", "q_proj", "v_proj"],
    "qwen3_5": ["gate_proj", "up_proj", "down_proj", "q_proj", "out_proj"],
    "gemma3": ["gate_proj", "up_proj", "down_proj", "q_proj", "v_proj"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def dense_attention(q_NQD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, call: Any) -> torch.Tensor:
    segments = call.segments
    documents, place = segments.document_of.flatten(), torch.arange(sum(segments.lengths))
    after = [-1 if number is None else number for number in segments.after or (None,) * len(segments.lengths)]
    goes_on = torch.tensor(after)[documents][:, None] == documents[None]
    seen = (goes_on | (documents[:, None] == documents[None])) & (place[:, None] >= place[None])
    if call.window is not None:
        before = [segments.lengths[number] if number >= 0 else 0 for number in after]
        starts = zip(before, segments.lengths, strict=True)
        position = torch.cat([torch.arange(first, first + length) for first, length in starts])
        seen &= position[:, None] - position[None] < call.window
    repeats = q_NQD.shape[1] // k_NKD.shape[1]
    q, k, v = q_NQD.transpose(0, 1), *(s.repeat_interleave(repeats, 1).transpose(0, 1) for s in (k_NKD, v_NKD))
    return ((q @ k.mT * call.scale).masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1)


def two_products(layer: Any, x: torch.Tensor) -> torch.Tensor:
    dropped = x
    if layer.dropout:
        kept = keep_mask(x.reshape(-1, layer.in_features).shape, layer.dropout, draw_seed(), x.device)
        dropped = x * kept.view(x.shape) / keep_share(layer.dropout)
    return F.linear(x, layer.weight, layer.bias) + layer.scaling * (dropped @ layer.lora_A.T @ layer.lora_B.T)


def full_loss(model: Any, batch: Any) -> torch.Tensor:
    logits = model.get_output_embeddings()(hidden_states(model, batch)).flatten(0, 1)
    return F.cross_entropy(logits[batch.label_at], batch.next_labels, reduction="sum")


def first_micro_batch(run: Any) -> tuple[Any, Any]:
    tinyrun.randomize_B(run)
    enter_phase(run.model, run.phases, run.phases.at(0))
    run.model.train()
    rows = run.datasets.train
    lines = run.layout.cut(rows, BatchPlan(rows, 8, 1, run.config.seed).rows_of(0))[0]
    return run.layout.batch(rows, lines, run.device), lines


def gradients(run: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(run.model.named_parameters())
    names = [name for name in run.phases.trained_names if named[name].requires_grad]
    return dict(zip(names, torch.autograd.grad(loss, [named[name] for name in names]), strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", BACKBONES)
def test_loss_and_gradients_equal_the_slow_reference(
    family: str, dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "base", family)
    tinyrun.tiny.write_rows(tmp_path / "rows.jsonl", 24)
    fast, slow = (
        tinyrun.assembled(
            tmp_path, backbone="auto", injection__allow_partial=True, injection__target_keywords=BACKBONES[family],
            injection__attn_lora__enabled=False, injection__lora_dropout=dropout, training__batch_size=8,
        )
        for _ in range(2)
    )  # fmt: skip
    batch, lines = first_micro_batch(fast)
    assert len(batch.segments.lengths) > 2
    assert bool(batch.segments.after) == (family != "qwen3_5"), "the rows begin alike"
    assert fast.norms.count
    assert fast.mlps.count == (0 if family == "mixtral" else len(fast.model.get_decoder().layers))
    torch.manual_seed(micro_batch_seed(1, 0, 0))
    with fast.forward(lines):
        loss, _ = label_token_loss(fast.model, batch)
    found = gradients(fast, loss)

    first_micro_batch(slow)
    slow.norms.remove()
    slow.mlps.remove()
    slow.model.double()
    if family == "mixtral":
        slow.model.set_experts_implementation("eager")  # grouped products take no float64
    monkeypatch.setitem(attention._KERNELS, "matmul", dense_attention)
    monkeypatch.setattr(LoRALinear, "forward", two_products)
    torch.manual_seed(micro_batch_seed(1, 0, 0))
    wanted = full_loss(slow.model, batch)
    assert wanted.dtype == torch.float64
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=2e-6)
    for name, true in gradients(slow, wanted).items():
        assert float(true.abs().max()) > 0, name
        torch.testing.assert_close(found[name].double(), true, rtol=1e-4, atol=1e-5 * float(true.abs().max()), msg=name)
