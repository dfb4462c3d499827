"""Every gap in the coverage is an error with its own message, unless the preset declares that a part is enough."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from tiny import tiny_model

from eulerforge.api import InjectionReport, SiteReport
from eulerforge.config.schema import LoadPrecision, ModelConfig, RunConfig
from eulerforge.errors import ModelError
from eulerforge.lora.apply import apply_injection
from eulerforge.lora.targets import select_targets
from eulerforge.lora.wrap import wrap_linear
from eulerforge.models.layout import DenseAdapter
from eulerforge.plugins import load_registry

REGISTRY = load_registry()
ALLOW = "--set injection.allow_partial=true trains with this coverage"


def run_config(backbone: str, keywords: tuple[str, ...], **injection: Any) -> RunConfig:
    config = REGISTRY.strategy_config("dense_lora")(target_keywords=keywords, lora_r=2, **injection)
    return RunConfig(
        model_name="m",
        backbone=backbone,
        model=ModelConfig(load_precision=LoadPrecision(mode="fp32")),
        injection=config,
    )


@attrs.frozen
class Replacing:
    """The registry with some parts replaced: ``parts`` maps a spec's name to the object behind it."""

    parts: dict[str, Any]

    def create(self, spec: Any) -> Any:
        return self.parts.get(spec.name) or REGISTRY.create(spec)

    def __getattr__(self, name: str) -> Any:
        return getattr(REGISTRY, name)


def test_the_tutorials_pair_runs_with_a_warning_that_says_what_it_covers() -> None:
    model = tiny_model("qwen3_5")
    injected = apply_injection(run_config("qwen3", ("up_proj", "q_proj")), REGISTRY, model)
    assert injected.warnings == (
        "q_proj reaches 2 of 4 layers; not reached: 0, 2",
        "backbone = qwen3.5 reaches all layers of this model",
    )
    assert injected.report.gaps == ("q_proj reaches 2 of 4 layers; not reached: 0, 2",)
    assert not injected.report.allow_partial


def test_the_tutorials_pair_does_not_excuse_a_misspelling() -> None:
    with pytest.raises(ModelError, match="'q_pro' matches nothing"):
        apply_injection(run_config("qwen3", ("up_proj", "q_pro")), REGISTRY, tiny_model("qwen3_5"))


@pytest.mark.parametrize("allowed", [False, True])
def test_exact_attention_keywords_on_qwen3_5(allowed: bool) -> None:
    run = run_config("qwen3.5", ("q_proj", "v_proj"), match="exact", allow_partial=allowed)
    message = (
        "q_proj reaches 2 of 4 layers; not reached: 0, 2; left out: linear_attn.qkv in 0, 2,"
        " which only injection.match = role translates"
    )
    if allowed:
        injected = apply_injection(run, REGISTRY, tiny_model("qwen3_5"))
        assert message in injected.warnings
        assert injected.report.gaps == (message, message.replace("q_proj", "v_proj"))
        assert injected.report.to_json()["allow_partial"] is True
    else:
        with pytest.raises(ModelError) as caught:
            apply_injection(run, REGISTRY, tiny_model("qwen3_5"))
        assert [problem.message for problem in caught.value.problems] == [message, message.replace("q_proj", "v_proj")]
        assert caught.value.problems[0].hint == ALLOW


class SkipsExperts:
    """A strategy that adapts linear modules and says nothing of the experts that its keywords reach."""

    def inject(self, model: Any, adapter: Any, config: Any, context: Any) -> InjectionReport:
        selection = select_targets(model, adapter, config, config.target_keywords)
        sites = [self.wrap(model, target) for target in selection.targets if target.parameter is None]
        return InjectionReport(strategy="linear_only", layers=selection.layers, depth=selection.depth, sites=sites)

    def wrap(self, model: Any, target: Any) -> SiteReport:
        wrap_linear(model, target.path, r=2, alpha=2)
        return SiteReport(
            path=target.path, layer=target.layer, role=target.role, group="lora", keyword=target.keyword, r=2, alpha=2,
            scaling=1, in_features=1, out_features=1, parameters=(f"{target.path}.lora_A",), parameter_count=1,
        )  # fmt: skip


def test_a_strategy_that_skips_experts_is_found_out() -> None:
    registry: Any = Replacing({"dense_lora": SkipsExperts()})
    run = run_config("mixtral", ("q_proj", "gate_proj"))
    with pytest.raises(ModelError) as caught:
        apply_injection(run, registry, tiny_model("mixtral"))
    (problem,) = caught.value.problems
    assert problem.message == (
        "gate_proj reaches 0 of 3 layers; not reached: 0-2; left out: experts.gate_up in 0-2,"
        " which strategy linear_only skips"
    )
    assert problem.hint == ALLOW
    with pytest.raises(ModelError, match="No trainable parameters: gate_proj reaches 0 of 3 layers"):
        apply_injection(run_config("mixtral", ("gate_proj",)), registry, tiny_model("mixtral"))
    # of the shared and the routed expert it adapts one
    with pytest.raises(ModelError, match=r"gate_proj reaches 4 of 4 layers; left out: experts.gate_up in 0-3"):
        apply_injection(run_config("qwen3.5", ("gate_proj",)), registry, tiny_model("qwen3_5_moe"))


class TowerAdapter(DenseAdapter):
    """Takes the vision tower's layers for the decoder's."""

    def find_transformer_layers(self, model: Any) -> Any:
        return list(model.model.vision_tower.encoder.layers)


@pytest.mark.parametrize("allowed", [False, True])
def test_a_vision_layer_reached_by_mistake(allowed: bool) -> None:
    registry: Any = Replacing({"gemma3": TowerAdapter()})
    run = run_config("gemma3", ("q_proj",), allow_partial=allowed)
    text = (
        "2 adapted modules lie outside the language stack (vision tower),"
        " model.vision_tower.encoder.layers.0.self_attn.q_proj first"
    )
    if allowed:
        assert text in apply_injection(run, registry, tiny_model("gemma3_multimodal")).report.gaps
    else:
        with pytest.raises(ModelError) as caught:
            apply_injection(run, registry, tiny_model("gemma3_multimodal"))
        assert caught.value.problems[0].message == text


def test_a_keyword_of_the_vision_tower_says_where_it_was_found() -> None:
    with pytest.raises(ModelError) as caught:
        apply_injection(run_config("gemma3", ("up_proj", "fc1")), REGISTRY, tiny_model("gemma3_multimodal"))
    assert caught.value.problems[0].message == (
        "the keyword 'fc1' matches nothing in the chosen layers; model.vision_tower.encoder.layers.0.mlp.fc1 lies"
        " outside the decoder layers and is never adapted"
    )


@pytest.mark.parametrize(
    ("family", "right"), [("mixtral", "mixtral"), ("gemma3", "gemma3"), ("qwen3_5_moe", "qwen3.5")]
)
def test_a_backbone_that_does_not_fit_names_the_right_one(family: str, right: str) -> None:
    with pytest.raises(ModelError, match="backbone qwen3 does not fit m") as caught:
        apply_injection(run_config("qwen3", ("q_proj",)), REGISTRY, tiny_model(family))
    assert caught.value.problems[0].hint == f"--set backbone={right}"


def test_declared_gaps_are_warnings_and_recorded_word_by_word() -> None:
    run = run_config("qwen3", ("q_proj", "gait_proj"), allow_partial=True)
    injected = apply_injection(run, REGISTRY, tiny_model("gemma3"))
    assert injected.report.gaps == (
        "backbone qwen3 does not fit m, whose model_type is 'gemma3_text'",
        "the keyword 'gait_proj' matches nothing in the chosen layers",
    )
    assert injected.warnings[-1] == "backbone = gemma3 reaches all layers of this model"
    assert set(injected.warnings) >= set(injected.report.gaps)
    with pytest.raises(ModelError, match="No trainable parameters"):
        apply_injection(run_config("auto", ("nothing",), allow_partial=True), REGISTRY, tiny_model())


def test_the_matrix_has_a_row_for_every_role_adapted_or_not() -> None:
    run = run_config("auto", ("up_proj", "q_proj"))
    report = apply_injection(run, REGISTRY, tiny_model("qwen3_5")).report
    table = report.coverage()
    assert {role: (row["reached"], row["present"]) for role, row in table.items()} == {
        "linear_attn.out": ([], [0, 2]),
        "linear_attn.qkv": ([0, 2], [0, 2]),
        "linear_attn.gate": ([], [0, 2]),
        "ffn.gate": ([], [0, 1, 2, 3]),
        "ffn.up": ([0, 1, 2, 3], [0, 1, 2, 3]),
        "ffn.down": ([], [0, 1, 2, 3]),
        "attn.q": ([1, 3], [1, 3]),
        "attn.k": ([], [1, 3]),
        "attn.v": ([], [1, 3]),
        "attn.o": ([], [1, 3]),
    }
    # r = 2; in_proj_qkv 32 -> 64, up 32 -> 48, q 32 -> 64 (query and gate)
    counts = {"linear_attn.qkv": 2 * 2 * 96, "ffn.up": 4 * 2 * 80, "attn.q": 2 * 2 * 96}
    assert {role: row["parameters"] for role, row in table.items() if row["parameters"]} == counts
    lines = report.lines()
    assert lines[0] == f"adapted 8 modules in 4 of 4 layers, {sum(counts.values()):,} parameters"
    assert any("attn.q" in line and "2 of 2 layers" in line and "1, 3" in line for line in lines)
    assert any("attn.k" in line and "0 of 2 layers" in line for line in lines)
