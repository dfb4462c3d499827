"""The logits of every family are what the loss takes for them, and what scales its own is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eulerforge.errors import RunError
from eulerforge.testing.tiny_models import FAMILIES, tiny_model
from eulerforge.training.headcheck import check_head


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_logits_of_its_head(family: str) -> None:
    model = tiny_model(family).train()
    layers = list(model.get_decoder().layers)
    assert check_head(model) is None
    assert model.training
    assert [id(layer) for layer in model.get_decoder().layers] == [id(layer) for layer in layers]


def test_soft_capped_logits_are_known() -> None:
    model = tiny_model("gemma3")
    model.config.get_text_config().final_logit_softcapping = 0.01
    assert check_head(model) is None


def scaled(model: Any, by: float) -> Any:
    real = model.forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        found = real(*arguments, **keywords)
        found.logits = found.logits * by
        return found

    model.forward = forward
    return model


def test_scaled_logits_are_refused() -> None:
    with pytest.raises(RunError, match="LlamaForCausalLM gives other logits than its output head"):
        check_head(scaled(tiny_model("llama3"), 1 / 8))


def test_logits_that_are_no_number_are_refused() -> None:
    with pytest.raises(RunError, match="other logits"):
        check_head(scaled(tiny_model("llama3"), float("nan")))


def test_a_model_that_cannot_be_asked_is_a_warning() -> None:
    model = tiny_model("llama3")
    layers = list(model.get_decoder().layers)

    def refuses(*_: Any, **__: Any) -> torch.Tensor:
        raise TypeError("pixel_values are missing")

    model.forward = refuses
    warning = check_head(model)
    assert warning == "the logits could not be compared with the head's: TypeError: pixel_values are missing"
    assert [id(layer) for layer in model.get_decoder().layers] == [id(layer) for layer in layers]
