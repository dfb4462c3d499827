"""One layer on a few tokens says what the whole model keeps on many: held against what autograd really keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tinyrun
import torch

from eulerforge.data.batches import Batch
from eulerforge.data.packing import Segments
from eulerforge.plugins import load_registry
from eulerforge.training import document_blocks
from eulerforge.training.estimated import Estimated, from_config
from eulerforge.training.forward import hidden_states
from eulerforge.training.layerblocks import OWN
from eulerforge.training.memory import KeptForBackward
from eulerforge.training.onelayer import CHUNK, TOKENS, record_layer
from eulerforge.training.peak import LossBlocks, MicroBatch, level_above, step_peak
from eulerforge.training.phases import enter_phase
from eulerforge.training.recompute import Offload, _Copied

CPU = torch.device("cpu")
FAMILIES = ("llama", "qwen3", "qwen3_moe", "gemma3", "mixtral", "qwen3_5")


def batch_of(lengths: tuple[int, ...], *, packed: bool = True) -> Batch:
    tokens = sum(lengths)
    shape = (1, tokens) if packed else (len(lengths), lengths[0])
    ids = torch.randint(100, shape, generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return Batch(
        input_ids=ids,
        attention_mask=None,
        label_at=ids.new_empty(0),
        next_labels=ids.new_empty(0),
        tokens=tokens,
        position_ids=positions if packed else None,
        segments=Segments(lengths=lengths, shape=(1, tokens), device=CPU) if packed else None,
    )


def really_kept(run: Any, batch: Batch) -> int:
    """Bytes that autograd keeps for the backward pass of the whole decoder."""
    counter = KeptForBackward(run.model)
    with counter.hooks():
        states = hidden_states(run.model, batch)
    states.sum().backward()
    run.model.zero_grad(set_to_none=True)
    return counter.bytes


def prepared_run(folder: Path, family: str, **changes: Any) -> Any:
    tinyrun.prepare(folder, family)
    changes = {"backbone": "auto", "injection__allow_partial": True, **changes}
    run = tinyrun.assembled(folder, "llama", **changes)
    enter_phase(run.model, run.phases, run.phases.at(0))
    run.model.train()
    return run


@pytest.mark.parametrize("packing", ["flat", "off"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_what_autograd_keeps(tmp_path: Path, family: str, packing: str) -> None:
    run = prepared_run(tmp_path, family, data__packing=packing)
    # documents that linear attention computes whole: its chunks are of 64, its rows as long as the longest
    lengths = (96, 160, 40) if family != "qwen3_5" else (384,)
    lengths = lengths if packing == "flat" else (128,)
    batch = batch_of(lengths, packed=packing == "flat")
    layers = list(run.model.get_decoder().layers)
    blocks = [
        record_layer(
            run.model,
            at,
            device=CPU,
            packed=packing == "flat",
            takes_gradient=at > 0,
            tokens=CHUNK if family == "qwen3_5" else TOKENS,
        )
        for at in range(len(layers))
    ]
    size = MicroBatch.of_rows(1, sum(lengths), packed=packing == "flat")
    # the decoder's result is there and is not kept, and so are the positions
    states = sum(lengths) * run.model.config.get_text_config().hidden_size * 4
    expected = really_kept(run, batch) + states + sum(lengths) * 8
    # a loop over chunks is not straight to the last byte: its first chunk keeps less than the next; Gemma has two
    # tables of positions, cosine and sine of 8 numbers each, and a layer sees its own alone
    exact = {"qwen3_5": 5e-2, "gemma3": 1.2e-2}.get(family, 1e-2)
    assert level_above(blocks, size) == pytest.approx(expected, rel=exact)
    assert [type(layer) for layer in run.model.get_decoder().layers] == [type(layer) for layer in layers]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_probabilities_that_attention_keeps_are_counted_document_by_document(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_blocks, "KEPT_SHARE", 20)
    run = prepared_run(tmp_path, family)
    lengths = (96, 260, 40, 700)  # the last one is too long
    estimated = from_config(run.config, load_registry(), run.source.folder, run.datasets, CPU)
    assert isinstance(estimated, Estimated)
    probabilities = estimated.estimator._probabilities
    count = len(run.model.get_decoder().layers)
    blocks = [
        record_layer(run.model, at, device=CPU, packed=True, takes_gradient=at > 0, tokens=TOKENS)
        for at in range(count)
    ]
    size = MicroBatch(tokens=sum(lengths), square=0, documents={(length, 0): 1 for length in lengths})
    states = sum(lengths) * run.model.config.get_text_config().hidden_size * 4
    expected = really_kept(run, batch_of(lengths, packed=True)) + states + sum(lengths) * 8
    found = probabilities(size, 0)
    assert found > 0.1 * expected
    assert level_above(blocks, size) + found == pytest.approx(expected, rel=1e-2)
    assert probabilities(MicroBatch(tokens=700, square=0, documents={(700, 0): 1}), 0) < found
    assert probabilities(MicroBatch(tokens=700, square=0), 0) == 0
    assert 0 < probabilities(size, 1) < found, "every layer computed again: one of them at a time"


def test_a_layer_without_weights_makes_the_same_blocks_and_is_left_as_it_was(tmp_path: Path) -> None:
    run = prepared_run(tmp_path, "llama")
    real = record_layer(run.model, 1, device=CPU, packed=True, takes_gradient=True)
    estimated = from_config(run.config, load_registry(), run.source.folder, run.datasets, CPU)
    assert isinstance(estimated, Estimated)
    model = estimated.estimator.model
    before = torch.get_rng_state()
    shapes_alone = record_layer(model, 1, device=CPU, packed=True, takes_gradient=True)
    assert torch.equal(before, torch.get_rng_state())
    assert (shapes_alone.forward, shapes_alone.backward) == (real.forward, real.backward)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert all(module._joined is None for module in model.modules() if hasattr(module, "_joined"))
    # q, v, gate, up and down are laid out beside their columns of B, filled up to 8
    columns, out = 8, 32 + 16 + 48 + 48 + 32
    assert shapes_alone.grown == 4 * columns * out


def test_a_layer_that_is_computed_again_keeps_its_input_alone(tmp_path: Path) -> None:
    run = prepared_run(tmp_path, "llama", training__gradient_checkpointing="all")
    blocks = record_layer(run.model, 1, device=CPU, packed=True, takes_gradient=True)
    size = MicroBatch.of_rows(1, 128, packed=True)
    assert blocks.kept(size.tokens, size.square) < 0.04 * 128 * 856
    plain = prepared_run(tmp_path / "plain", "llama")
    whole = record_layer(plain.model, 1, device=CPU, packed=True, takes_gradient=True)
    assert whole.kept(size.tokens, size.square) == 128 * 856


def test_what_leaves_the_device_is_not_counted_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU nothing leaves, so copies go to the meta device, which takes no memory."""
    real = Offload._pack

    def away(self: Offload, tensor: torch.Tensor) -> Any:
        packed = real(self, tensor)
        return packed if isinstance(packed, torch.Tensor) else _Copied(tensor.device, packed.copy.to("meta"))

    monkeypatch.setattr(Offload, "_pack", away)
    back = staticmethod(lambda packed: torch.zeros(packed.copy.shape) if isinstance(packed, _Copied) else packed)
    monkeypatch.setattr(Offload, "_unpack", back)
    run = prepared_run(tmp_path, "llama")
    stays, leaves = (
        record_layer(run.model, 1, device=CPU, packed=True, takes_gradient=True, offload=offload)
        for offload in (False, True)
    )
    size = MicroBatch.of_rows(1, 128, packed=True)
    assert leaves.kept(size.tokens, size.square) < 0.02 * stays.kept(size.tokens, size.square)
    loss = LossBlocks(room=0, work=0)
    few, many = (step_peak([leaves] * count, size, loss, accumulates=True) for count in (2, 20))
    # the workspace brings back what one layer needs, however many there are
    assert few.activations + few.workspace == many.activations + many.workspace
    whole = step_peak([stays] * 2, size, loss, accumulates=True)
    assert few.workspace >= whole.workspace


def test_layers_that_do_other_operations_for_more_tokens_are_summed(tmp_path: Path) -> None:
    run = prepared_run(tmp_path, "qwen3_5")
    linear = record_layer(run.model, 2, device=CPU, packed=True, takes_gradient=True, tokens=CHUNK)
    full = record_layer(run.model, 1, device=CPU, packed=True, takes_gradient=True)
    assert any(step.block >= OWN for step in linear.forward)
    assert not any(step.block >= OWN for step in full.forward)
    assert linear.kept(1280, 0) > 3 * full.kept(1280, 0)
