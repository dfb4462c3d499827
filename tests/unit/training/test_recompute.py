"""Recomputed and offloaded activations: the same bits, fewer bytes, and a choice that follows the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from eulerforge.errors import ConfigError, UsageError
from eulerforge.training import document_blocks, limits, recompute
from eulerforge.training.forward import label_token_loss
from eulerforge.training.memory import KeptForBackward
from eulerforge.training.phases import enter_phase
from eulerforge.training.recompute import Offload, choose_every, every_of


def gradients(run: Any, context: Any = None) -> tuple[dict[str, torch.Tensor], int]:
    """Every gradient of the first micro-batch, and the bytes that were kept for them."""
    rows = run.datasets.train
    batch = run.layout.batch(rows, run.layout.cut(rows, list(range(4)))[0], run.device)
    enter_phase(run.model, run.phases, run.phases.at(0))
    run.model.train()
    run.model.zero_grad()
    torch.manual_seed(3)
    counter = KeptForBackward(run.model)
    with context(run.model) if context else counter.hooks():
        loss, _ = label_token_loss(run.model, batch)
    loss.backward()
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}, counter.bytes


@pytest.fixture
def four_layers(prepared: Any, tmp_path: Any) -> Callable[..., Any]:
    """Runs of a tiny Llama of four layers with seeded dropout and adapters that are not zero."""
    import tinyrun

    folder = tinyrun.prepare(tmp_path / "four", num_hidden_layers=4)

    def make(**changes: Any) -> Any:
        run = tinyrun.assembled(folder, **{"injection__lora_dropout": 0.2, **changes})
        tinyrun.randomize_B(run)
        return run

    return make


def test_every_nth_layer_gives_the_same_bits_and_keeps_less(four_layers: Callable[..., Any]) -> None:
    whole, most = gradients(four_layers())
    kept = [most]
    for mode, switched in (("every_2", [1, 3]), ("all", [0, 1, 2, 3])):
        run = four_layers(training__gradient_checkpointing=mode)
        layers = run.model.get_decoder().layers
        assert [at for at, layer in enumerate(layers) if layer.gradient_checkpointing] == switched
        again, less = gradients(run)
        assert whole.keys() == again.keys()
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        kept.append(less)
    assert kept == sorted(kept, reverse=True)
    assert kept[2] < 0.5 * kept[0]


@pytest.mark.parametrize("mode", ["off", "all"])
def test_layers_below_the_first_adapted_one_keep_nothing(four_layers: Callable[..., Any], mode: str) -> None:
    run = four_layers(injection__start_layer=2, training__gradient_checkpointing=mode)
    rows, batch_of = run.datasets.train, run.layout
    batch = batch_of.batch(rows, batch_of.cut(rows, list(range(4)))[0], run.device)
    enter_phase(run.model, run.phases, run.phases.at(0))
    run.model.train()
    seen: dict[int, bool] = {}
    for at, layer in enumerate(run.model.get_decoder().layers):
        layer.register_forward_hook(lambda _m, _i, out, at=at: seen.update({at: out.requires_grad}))
    label_token_loss(run.model, batch)
    assert seen == {0: False, 1: False, 2: True, 3: True}
    _, upper = gradients(run)
    _, whole = gradients(four_layers())
    assert upper < 0.7 * whole


def test_true_and_false_are_still_taken_and_nonsense_is_not(make_run: Callable[..., Any]) -> None:
    for given, wanted in ((True, "all"), (False, "off"), ("every_3", "every_3")):
        assert make_run(training__gradient_checkpointing=given).config.training.gradient_checkpointing == wanted
    for wrong in ("some", "every_0", "every_"):
        with pytest.raises(ConfigError, match="is not allowed"):
            make_run(training__gradient_checkpointing=wrong)
    assert [every_of(word) for word in ("off", "all", "every_5", "auto")] == [0, 1, 5, None]


@pytest.mark.parametrize(("needed", "every"), [(0, 0), (8, 8), (4, 4), (2, 2), (1, 1), (None, 1)])
def test_auto_takes_the_least_recomputation_that_fits(needed: int | None, every: int) -> None:
    asked: list[int] = []

    def fits(n: int) -> bool:
        asked.append(n)
        return n == needed

    assert choose_every(fits) == every
    assert asked == [0, 8, 4, 2, 1][: len(asked)]


def test_auto_asks_the_estimate_and_says_what_it_chose(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_run(training__gradient_checkpointing="auto").kept.every == 0
    monkeypatch.setattr(limits, "free_bytes", lambda device: 1)
    run = make_run(training__gradient_checkpointing="auto")
    assert run.kept.every == 1
    assert all(layer.gradient_checkpointing for layer in run.model.get_decoder().layers)
    assert "every layer is computed again" in run.estimated.choice()
    assert run.estimated.line().startswith("warning: estimated from config.json: ")
    assert not run.model.training


def test_offloaded_activations_give_the_same_bits(
    four_layers: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute, "OFFLOADED_BYTES", 64)
    run = four_layers()
    whole, _ = gradients(run)
    away: list[int] = []
    plain = Offload._pack

    def counted(self: Offload, tensor: torch.Tensor) -> Any:
        packed = plain(self, tensor)
        away.append(not isinstance(packed, torch.Tensor))
        assert away[-1] or tensor.numel() * tensor.element_size() < 64 or tensor.is_leaf
        return packed

    monkeypatch.setattr(Offload, "_pack", counted)
    again, _ = gradients(run, lambda model: Offload(model.parameters()).hooks())
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert sum(away) > 20


def test_what_two_functions_save_is_copied_once_and_a_reused_place_is_not_mistaken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recompute, "OFFLOADED_BYTES", 64)
    offload = Offload(torch.nn.Linear(2, 2).parameters())
    saved = torch.arange(64.0)
    first = offload._pack(saved)
    assert offload._pack(saved) is first
    saved.add_(1)  # no longer what the first function saved
    second = offload._pack(saved)
    assert second is not first
    assert torch.equal(Offload._unpack(first), torch.arange(64.0))
    assert torch.equal(Offload._unpack(second), torch.arange(64.0) + 1)
    for number in range(50):  # the allocator gives the same place again
        other = torch.full((64,), float(number))
        assert torch.equal(Offload._unpack(offload._pack(other)), torch.full((64,), float(number)))
        del other


def test_offloading_without_a_gpu_is_refused(make_run: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="main memory already"):
        make_run(training__offload_activations=True)


@pytest.mark.filterwarnings("ignore")  # dynamo reads every attribute of what it traces, deprecated ones too
def test_compiled_layers_keep_their_names_and_their_numbers(make_run: Callable[..., Any]) -> None:
    from eulerforge.training.compiled import compile_layers

    run = make_run()
    names = [name for name, _ in run.model.named_parameters()]
    whole, _ = gradients(run)
    document_blocks.documents_of.cache_clear()
    document_blocks.orders_of.cache_clear()
    lines = compile_layers(run.model.get_decoder().layers, torch.device("cpu"), backend="aot_eager")
    assert "does not pay" in lines[0]
    again, _ = gradients(run)
    assert [name for name, _ in run.model.named_parameters()] == names
    for name in whole:
        torch.testing.assert_close(again[name], whole[name], rtol=1e-4, atol=1e-6)
