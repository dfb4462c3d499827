"""Every tiny model is a working model of its family, and plain transformers opens what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from eulerforge.testing.tiny_models import (
    FAMILIES,
    IMAGE,
    VOCABULARY,
    save_tiny,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_runs_learns_and_is_the_same_twice(family: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    output = model(input_ids=ids, labels=ids, use_cache=False)
    assert output.logits.shape == (2, 20, VOCABULARY)
    output.loss.backward()
    language = model.get_decoder().layers
    assert all(parameter.grad is not None for parameter in language[-1].parameters())
    again = tiny_model(family).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_family_is_opened_by_plain_transformers(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family, seed=3)
    auto = AutoModelForImageTextToText if family.endswith("multimodal") else AutoModelForCausalLM
    opened, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(3, 23)[None]
    before, after = tiny_model(family, 3)(input_ids=ids).logits, opened.eval()(input_ids=ids).logits
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


def test_hybrids_have_both_kinds_of_layers() -> None:
    assert tiny_config("qwen3_5").layer_types == ["linear_attention", "full_attention"] * 2
    assert tiny_config("qwen3_5_multimodal").text_config.layer_types == ["linear_attention", "full_attention"] * 2
    assert tiny_config("gemma3").layer_types == ["sliding_attention", "full_attention"] * 2
    assert tiny_config("gemma3_multimodal").text_config.layer_types == ["sliding_attention", "full_attention"] * 2


def test_changes_reach_the_language_part() -> None:
    assert tiny_config("gemma3_multimodal", hidden_size=64).text_config.hidden_size == 64
    assert len(tiny_model("qwen3_5_multimodal", num_hidden_layers=2).get_decoder().layers) == 2


def test_the_tokenizer_never_writes_a_multimodal_token() -> None:
    tokenizer = tiny_tokenizer()
    assert max(tokenizer.get_vocab().values()) < IMAGE
    assert tokenizer.decode(tokenizer("What is a beam?")["input_ids"]) == "What is a beam?"
