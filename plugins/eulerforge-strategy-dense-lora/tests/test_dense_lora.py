"""What the strategy injects into a small model, and what its config refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eulerforge.errors import ModelError
from eulerforge.lora.state import adapter_state, load_adapter_state
from eulerforge.lora.wrap import unwrap
from eulerforge.models.layout import DenseAdapter
from eulerforge_strategy_dense_lora.config import AttentionLoRAConfig, DenseLoRAConfig
from eulerforge_strategy_dense_lora.injection import inject_dense_lora_inplace

DEPTH = 3


def small_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


def config(**changes: Any) -> DenseLoRAConfig:
    return DenseLoRAConfig(lora_r=4, lora_alpha=8.0, **changes)


def test_the_tutorials_targets_are_reached_and_the_output_is_unchanged() -> None:
    model = small_llama()
    ids = torch.arange(12)[None]
    before = model(ids).logits
    report = inject_dense_lora_inplace(model, DenseAdapter(), config(attn_lora=AttentionLoRAConfig(enabled=True)))
    assert torch.equal(model(ids).logits, before)
    assert {site.role for site in report.sites} == {"ffn.gate", "ffn.up", "ffn.down", "attn.q", "attn.v"}
    assert len(report.sites) == 5 * DEPTH
    assert report.parameter_count == DEPTH * 4 * ((16 + 24) * 3 + (16 + 16) + (16 + 8))
    assert not report.unmatched
    assert not report.partial
    assert {name.rpartition(".")[2] for name in report.groups["lora"]} == {"lora_A", "lora_B"}
    assert all(".self_attn." in name for name in report.groups["attn_lora"])


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({"attn_lora": AttentionLoRAConfig(keywords=("k_proj",), lora_r=2)}, ["keywords", "lora_r"]),
        ({"attn_lora": AttentionLoRAConfig(lora_alpha=2.0)}, ["lora_alpha"]),
        # a target keyword that names an attention projection has this rank, switch or not
        ({"attn_lora": AttentionLoRAConfig(lora_r=2), "target_keywords": ("q_proj",)}, []),
        ({"attn_lora": AttentionLoRAConfig(enabled=True, keywords=("k_proj",), lora_r=2)}, []),
        ({}, []),
    ],
)
def test_what_is_written_of_attn_lora_while_it_is_off_is_said(changes: dict[str, Any], idle: list[str]) -> None:
    report = inject_dense_lora_inplace(small_llama(), DenseAdapter(), config(**changes))
    want = [f"injection.attn_lora.{key} does nothing without --set injection.attn_lora.enabled=true" for key in idle]
    assert list(report.warnings) == want


@pytest.mark.parametrize(
    ("where", "layers"),
    [
        ({}, {0, 1, 2}),
        ({"start_layer": 1}, {1, 2}),
        ({"start_layer": 1, "num_layers": 1}, {1}),
        ({"layer_indices": (0, 2)}, {0, 2}),
    ],
)
def test_the_window_of_layers(where: dict[str, Any], layers: set[int]) -> None:
    report = inject_dense_lora_inplace(small_llama(), DenseAdapter(), config(**where))
    assert {site.layer for site in report.sites} == layers


@pytest.mark.parametrize("where", [{"start_layer": 3}, {"start_layer": 2, "num_layers": 2}, {"layer_indices": (5,)}])
def test_layers_beyond_the_depth_are_refused_by_name(where: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="the model has 3 layers"):
        inject_dense_lora_inplace(small_llama(), DenseAdapter(), config(**where))


def test_a_keyword_is_a_whole_name_never_a_substring() -> None:
    report = inject_dense_lora_inplace(small_llama(), DenseAdapter(), config(target_keywords=("proj", "gate_proj")))
    assert set(report.unmatched) == {"proj"}
    assert {site.role for site in report.sites} == {"ffn.gate"}


def test_attention_adapters_may_have_a_rank_of_their_own() -> None:
    attention = AttentionLoRAConfig(enabled=True, lora_r=2, lora_alpha=6.0)
    report = inject_dense_lora_inplace(small_llama(), DenseAdapter(), config(attn_lora=attention))
    assert {site.group: (site.r, site.scaling) for site in report.sites} == {"lora": (4, 2.0), "attn_lora": (2, 3.0)}


def test_initial_values_do_not_depend_on_what_else_is_adapted() -> None:
    alone, both = small_llama(), small_llama()
    inject_dense_lora_inplace(alone, DenseAdapter(), config(target_keywords=("up_proj",)), seed=7)
    inject_dense_lora_inplace(both, DenseAdapter(), config(), seed=7)
    first, second = adapter_state(alone), adapter_state(both)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_state_goes_out_and_in_and_unwrap_restores_the_model() -> None:
    model = small_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject_dense_lora_inplace(model, DenseAdapter(), config())
    state = {name: torch.randn_like(tensor) for name, tensor in adapter_state(model).items()}
    load_adapter_state(model, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter_state(model).items())
    assert unwrap(model) == 3 * DEPTH
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rank_zero_is_explained() -> None:
    problems = list(DenseLoRAConfig(lora_r=0).check())
    assert [problem.key for problem in problems] == ["lora_r"]
    assert "LoRA layers will act as Identity" in problems[0].message
