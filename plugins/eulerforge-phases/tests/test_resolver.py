"""Which parameters each standard group names."""

from __future__ import annotations

from typing import Any

import torch

from eulerforge.models.layout import DenseAdapter
from eulerforge_phases.resolver import StandardGroups
from eulerforge_strategy_dense_lora.config import AttentionLoRAConfig, DenseLoRAConfig
from eulerforge_strategy_dense_lora.injection import inject_dense_lora_inplace


def resolved(**changes: Any) -> tuple[Any, dict[str, tuple[str, ...]]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    config = DenseLoRAConfig(lora_r=2, attn_lora=AttentionLoRAConfig(enabled=True), **changes)
    report = inject_dense_lora_inplace(model, DenseAdapter(), config)
    return model, {
        name: tuple(found) for name, found in StandardGroups().resolve(model, DenseAdapter(), report).items()
    }


def test_the_groups_are_disjoint_and_name_real_parameters() -> None:
    model, groups = resolved()
    names = [name for found in groups.values() for name in found]
    assert len(names) == len(set(names))
    assert set(names) <= {name for name, _ in model.named_parameters()}
    assert {name: len(found) for name, found in groups.items()} == {
        "lora": 3 * 3 * 2, "attn_lora": 3 * 2 * 2, "router": 0, "base_ffn": 3 * 3,
    }  # fmt: skip


def test_base_ffn_is_the_base_weights_of_the_chosen_layers_only() -> None:
    _, groups = resolved(start_layer=2, target_keywords=("up_proj",))
    assert groups["base_ffn"] == (
        "model.layers.2.mlp.gate_proj.weight",
        "model.layers.2.mlp.up_proj.base_layer.weight",
        "model.layers.2.mlp.down_proj.weight",
    )
