"""A layer that cannot be computed by itself costs the run its estimate, said with the reason, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from eulerforge.config.schema import LoadPrecision
from eulerforge.training.estimated import Estimated, NoEstimate
from eulerforge.training.preflight import preflight, preflight_lines


def refusing(monkeypatch: pytest.MonkeyPatch, refuses: Callable[[Any, torch.Tensor], str]) -> None:
    """Each decoder layer raises what ``refuses`` says of it and of its states, as a plugin's own layer might."""
    forward = LlamaDecoderLayer.forward

    def checked(self: Any, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        if reason := refuses(self, hidden_states):
            raise ValueError(f"{reason}\nand more about it")
        return forward(self, hidden_states, *arguments, **keywords)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", checked)


def refuse_zero_weights(layer: Any, _: torch.Tensor) -> str:
    return "" if layer.input_layernorm.weight.any() else "the scales are all zero"


def refuse_one_word(_: Any, states: torch.Tensor) -> str:
    """What the estimate computes a layer on."""
    return "all words are the same" if torch.equal(states, states[:, :1].expand_as(states)) else ""


def test_a_layer_that_wants_its_weights_is_estimated_once_they_are_there(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_run(estimates=True).estimated
    refusing(monkeypatch, refuse_zero_weights)
    said: list[str] = []
    run = make_run(estimates=True, say=said.append)
    assert "no estimate of memory: ValueError: the scales are all zero" in said
    assert isinstance(run.estimated, Estimated)
    assert run.estimated.found.activations == expected.found.activations
    assert not any("estimate" in warning for warning in run.warnings)


def test_without_an_estimate_preflight_goes_on_and_says_why(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, refuse_one_word)
    run = make_run(estimates=True)
    assert isinstance(run.estimated, NoEstimate)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    result = preflight(run)
    assert result["memory"] is None
    assert result["forecast"]["tokens_per_s"] > 0
    reason = "no estimate of memory: ValueError: all words are the same"
    assert reason in result["warnings"]
    assert f"warning: {reason}" in preflight_lines(result, run)


def test_without_an_estimate_auto_takes_the_least_memory(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, refuse_one_word)
    said: list[str] = []
    run = make_run(training__gradient_checkpointing="auto", say=said.append)
    assert run.kept.every == 1
    assert any("every layer is computed again" in line for line in said)


@pytest.mark.parametrize("mode", ["fp32", "int4", "int8"])
def test_a_card_never_holds_the_file_beside_the_weights(make_run: Callable[..., Any], mode: str) -> None:
    """What the card holds while the weights are read; what is in the main memory then is no part of it."""
    estimator = make_run(estimates=True).estimated.estimator
    model = attrs.evolve(estimator.config.model, load_precision=LoadPrecision(mode=mode))
    estimator.config = attrs.evolve(estimator.config, model=model)
    on_cpu, _, again_on_cpu = estimator._weights([])
    estimator.device = torch.device("cuda")
    weights, load, again = estimator._weights([])
    assert weights == on_cpu
    largest = estimator._largest_weight
    size = estimator.dtype.itemsize
    assert load == (weights if mode == "fp32" else weights + largest * (size + 2))
    assert again == again_on_cpu + (4 * largest if mode == "int8" else 0)
