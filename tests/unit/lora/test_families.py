"""Every family: a few steps change every adapter tensor and no base tensor, and merged equals live."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eulerforge.config.schema import LoadPrecision, ModelConfig, RunConfig
from eulerforge.lora.apply import apply_injection
from eulerforge.lora.merge import merge_in_place
from eulerforge.lora.state import adapter_state
from eulerforge.models.linear_ops import linear_ops_from
from eulerforge.plugins import load_registry
from eulerforge.testing.tiny_models import FAMILIES, tiny_model

REGISTRY = load_registry()
IDS = torch.tensor(
    [[5, 9, 33, 70, 12, 101, 4, 8, 61, 30, 22, 90, 17, 55], [7, 3, 80, 44, 91, 26, 15, 2, 6, 66, 71, 39, 48, 11]]
)
MIXTURES = ("qwen3_moe", "qwen3_5_moe", "qwen3_5_moe_multimodal", "mixtral")


def injected(family: str, **options: Any) -> tuple[Any, Any]:
    config = REGISTRY.strategy_config("dense_lora")
    attention = REGISTRY.strategy_config("dense_lora")().attn_lora.__class__(enabled=True)
    injection = config(lora_r=8, lora_alpha=16.0, attn_lora=attention, **options)
    model = tiny_model(family).train()
    run = RunConfig(
        model_name="m",
        backbone="auto",
        model=ModelConfig(load_precision=LoadPrecision(mode="fp32")),
        injection=injection,
    )
    return model, apply_injection(run, REGISTRY, model).report


@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_the_adapters_alone_and_merged_equals_live(family: str) -> None:
    model, report = injected(family)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    adapters = adapter_state(model).keys()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == adapters
    assert adapters == {name for site in report.sites for name in site.parameters}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert {name for name, tensor in after.items() if not torch.equal(tensor, before[name])} == adapters
    model.eval()
    with torch.no_grad():
        live = model(IDS).logits
        assert merge_in_place(model, linear_ops_from(REGISTRY)) == len({site.path for site in report.sites})
        torch.testing.assert_close(model(IDS).logits, live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", MIXTURES)
def test_both_fused_parameters_of_a_layer_are_sites_of_their_own(family: str) -> None:
    model, report = injected(family, lora_dropout=0.1)
    fused = [site for site in report.sites if site.base_parameter]
    assert {(site.role, site.base_parameter) for site in fused} == {
        ("experts.gate_up", "gate_up_proj"),
        ("experts.down", "down_proj"),
    }
    parameters = dict(model.named_parameters())
    for site in fused:
        assert site.path.endswith("mlp.experts")
        assert site.group == "lora"
        shapes = [tuple(parameters[name].shape) for name in site.parameters]
        assert shapes == [(4, 8, site.in_features), (4, site.out_features, 8)]
        assert site.parameter_count == 4 * 8 * (site.in_features + site.out_features)


def test_one_keyword_adapts_one_parameter_and_its_initial_values_stay() -> None:
    alone, report = injected("mixtral", target_keywords=("down_proj",))
    both, _ = injected("mixtral")
    assert {site.base_parameter for site in report.sites if site.role.startswith("experts")} == {"down_proj"}
    first, second = adapter_state(alone), adapter_state(both)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
