"""What a keyword reaches in every family, and what counts as a gap: a table per family, written by hand."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_model

from eulerforge.api import InjectionConfig, Site
from eulerforge.lora.coverage import Place, uncovered
from eulerforge.lora.targets import select_targets
from eulerforge.plugins import load_registry

REGISTRY = load_registry()
FFN = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def adapter_of(name: str) -> Any:
    return REGISTRY.create(REGISTRY.backbone(name))


def select(family: str, backbone: str, keywords: tuple[str, ...], **config: Any) -> Any:
    return select_targets(tiny_model(family), adapter_of(backbone), InjectionConfig(**config), keywords)


def by_layer(selection: Any) -> dict[int, list[str]]:
    """Layer -> what is adapted in it, without the layer's own name."""
    found: dict[int, list[str]] = {}
    for target in selection.targets:
        name = target.path.rpartition(f"layers.{target.layer}.")[2]
        found.setdefault(target.layer, []).append(f"{name}.{target.parameter}" if target.parameter else name)
    return {layer: sorted(names) for layer, names in found.items()}


DENSE_FFN = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
SHARED = ["mlp.shared_expert.down_proj", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"]
FULL = ["self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]
LINEAR = ["linear_attn.in_proj_qkv", "linear_attn.out_proj"]

REACHED: dict[tuple[str, str], tuple[dict[int, list[str]], dict[int, list[str]]]] = {
    ("llama", "llama3"): (dict.fromkeys(range(3), DENSE_FFN), dict.fromkeys(range(3), FULL)),
    ("qwen3", "qwen3"): (dict.fromkeys(range(3), DENSE_FFN), dict.fromkeys(range(3), FULL)),
    ("qwen3_moe", "qwen3"): ({0: DENSE_FFN, 1: EXPERTS, 2: EXPERTS}, dict.fromkeys(range(3), FULL)),
    ("mixtral", "mixtral"): (dict.fromkeys(range(3), EXPERTS), dict.fromkeys(range(3), FULL)),
    **{
        (family, "gemma3"): (dict.fromkeys(range(4), DENSE_FFN), dict.fromkeys(range(4), FULL))
        for family in ("gemma3", "gemma3_multimodal")
    },
    **{
        (family, "qwen3.5"): (dict.fromkeys(range(4), DENSE_FFN), {0: LINEAR, 1: FULL, 2: LINEAR, 3: FULL})
        for family in ("qwen3_5", "qwen3_5_multimodal")
    },
    **{
        (family, "qwen3.5"): (
            dict.fromkeys(range(4), sorted(EXPERTS + SHARED)),
            {0: LINEAR, 1: FULL, 2: LINEAR, 3: FULL},
        )
        for family in ("qwen3_5_moe", "qwen3_5_moe_multimodal")
    },
}


@pytest.mark.parametrize(("family", "backbone"), REACHED)
def test_what_the_keywords_of_the_tutorial_reach(family: str, backbone: str) -> None:
    feed_forward, attention = REACHED[family, backbone]
    for keywords, wanted in ((FFN, feed_forward), (ATTENTION, attention)):
        selection = select(family, backbone, keywords)
        assert by_layer(selection) == wanted
        assert not selection.unmatched
        assert not selection.partial


@pytest.mark.parametrize(("family", "backbone"), REACHED)
def test_the_language_stack_is_all_that_is_looked_at(family: str, backbone: str) -> None:
    selection = select(family, backbone, (*FFN, *ATTENTION))
    prefix = "model.language_model.layers." if family.endswith("multimodal") else "model.layers."
    assert all(target.path.startswith(prefix) for target in selection.targets)
    assert selection.depth == len({target.layer for target in selection.targets})


@pytest.mark.parametrize(("family", "backbone"), REACHED)
def test_every_role_is_declared_and_found(family: str, backbone: str) -> None:
    spec = REGISTRY.backbone(backbone)
    adapter, model = adapter_of(backbone), tiny_model(family)
    layers = adapter.find_transformer_layers(model)
    roles = {site.role for layer in layers for site in adapter.find_sites(layer)}
    assert roles <= set(spec.roles)
    mixture = "moe" in family or family == "mixtral"
    routers = {name for layer in layers for name in adapter.find_routers(layer)}
    shared = {"mlp.shared_expert_gate.weight"} if "qwen3_5_moe" in family else set()
    assert routers == ({"mlp.gate.weight"} | shared if mixture else set())
    if mixture:
        assert "router" in spec.roles
    assert model.config.model_type in spec.model_types


def test_exact_keywords_leave_the_linear_attention_of_qwen3_5_out() -> None:
    selection = select("qwen3_5", "qwen3.5", ("q_proj", "v_proj"), match="exact")
    assert by_layer(selection) == {layer: ["self_attn.q_proj", "self_attn.v_proj"] for layer in (1, 3)}
    assert selection.partial == {"q_proj": (0, 2), "v_proj": (0, 2)}


def test_exact_keywords_for_both_kinds_of_attention_leave_no_layer_out() -> None:
    keywords = ("q_proj", "k_proj", "v_proj", "in_proj_qkv")
    selection = select("qwen3_5", "qwen3.5", keywords, match="exact")
    assert len(selection.targets) == 2 * 3 + 2
    assert not selection.partial
    # o_proj means out_proj in the linear layers, and nothing adapts that
    assert select("qwen3_5", "qwen3.5", (*keywords, "o_proj"), match="exact").partial == {"o_proj": (0, 2)}


def test_a_keyword_of_one_kind_of_layer_alone_is_partial() -> None:
    assert select("qwen3_5", "qwen3.5", ("in_proj_z",)).partial == {"in_proj_z": (1, 3)}
    assert not select("qwen3_5", "qwen3.5", ("in_proj_z", "q_proj")).partial
    # feed-forward places do not make up for attention
    assert select("qwen3_5", "qwen3.5", ("in_proj_z", "up_proj")).partial == {"in_proj_z": (1, 3)}


def test_exact_names_of_a_mixture() -> None:
    assert select("mixtral", "mixtral", ("gate_proj",), match="exact").unmatched["gate_proj"][0] == "gate_up_proj"
    assert not select("mixtral", "mixtral", ("gate_up_proj", "down_proj"), match="exact").partial
    # the shared expert alone is not what gate_proj means
    assert select("qwen3_5_moe", "qwen3.5", ("gate_proj",), match="exact").partial == {"gate_proj": (0, 1, 2, 3)}


def test_the_checkpoints_names_of_mixtral_are_keywords() -> None:
    names = select("mixtral", "mixtral", ("w1", "w2", "w3"))
    assert by_layer(names) == by_layer(select("mixtral", "mixtral", FFN))


@pytest.mark.parametrize("keyword", ["in_proj_a", "in_proj_b", "shared_expert_gate"])
def test_what_is_too_narrow_for_an_adapter_is_no_site(keyword: str) -> None:
    assert set(select("qwen3_5_moe", "qwen3.5", (keyword,)).unmatched) == {keyword}


class Words:
    """A family with the keywords a and b; a means the roles ffn.up and experts.down."""

    def roles_of(self, keyword: str) -> tuple[str, ...]:
        return {"a": ("ffn.up", "experts.down"), "b": ("attn.q",)}.get(keyword, ())


def test_a_gap_tells_untouched_layers_from_what_was_left_out() -> None:
    up, down, query = Site("up", "ffn.up"), Site("mlp", "experts.down", "down"), Site("q", "attn.q")
    sites = {0: (up, query), 1: (down, query), 2: (up, down), 4: (query,)}
    adapted = {Place(0, "up", None), Place(2, "up", None), Place(0, "q", None)}
    gaps = uncovered(Words(), sites, ("a", "b"), adapted)  # type: ignore[arg-type]
    assert gaps["a"].layers == (1, 2, 4)
    assert gaps["a"].untouched == (1, 4)
    assert gaps["a"].left_out == {"experts.down": (1, 2)}
    assert gaps["b"].layers == (1, 2, 4)
    assert gaps["b"].left_out == {"attn.q": (1, 4)}
    everything = {Place(index, site.path, site.parameter) for index, found in sites.items() for site in found}
    assert set(uncovered(Words(), {0: sites[0], 1: sites[1]}, ("a", "b"), everything)) == set()  # type: ignore[arg-type]
