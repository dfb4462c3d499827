"""Groups to parameters, and the phases of a run with everything that can be wrong with them."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from eulerforge.api import InjectionReport, SiteReport
from eulerforge.config.schema import PhaseConfig, TrainingConfig
from eulerforge.errors import ConfigError, EulerForgeError, ModelError, PluginError
from eulerforge.training.phases import PhasePlan, enter_phase, plan_phases, resolve_groups


def site(path: str, group: str) -> SiteReport:
    return SiteReport(
        path=path, layer=0, role="ffn.up", group=group, keyword="k", r=1, alpha=1.0, scaling=1.0, in_features=2,
        out_features=2, parameters=(f"{path}.weight", f"{path}.bias"), parameter_count=6,
    )  # fmt: skip


def phase(step: int, *trainable: str) -> PhaseConfig:
    return PhaseConfig(step=step, trainable=trainable)


def plan(*phases: PhaseConfig, groups: Any = None, **options: Any) -> PhasePlan:
    return plan_phases(TrainingConfig(phases=phases), groups or GROUPS, REPORT, **options)


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(2, 2) for name in ("up", "q", "base")})


REPORT = InjectionReport(
    strategy="dense_lora", layers=(0,), depth=1, sites=(site("up", "lora"), site("q", "attn_lora"))
)
GROUPS = {
    "lora": ("up.weight", "up.bias"),
    "attn_lora": ("q.weight", "q.bias"),
    "router": (),
    "empty": (),
    "base_ffn": ("base.weight",),
}


def resolver(answer: Any) -> tuple[Any, Any]:
    def resolve(*_: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return SimpleNamespace(name="standard"), SimpleNamespace(resolve=resolve)


def test_groups_come_from_the_resolvers_and_from_the_injection(model: nn.Module) -> None:
    found = resolve_groups(model, None, REPORT, [resolver({"base": ["base.weight"], "lora": ["up.bias"]})])  # type: ignore[arg-type]
    assert found == {"base": ("base.weight",), "lora": ("up.bias",), "attn_lora": ("q.weight", "q.bias")}


@pytest.mark.parametrize(
    ("answers", "part"),
    [
        ([{"g": ["nowhere.weight"]}], "'nowhere.weight' is not a parameter"),
        ([{"g": []}, {"g": []}], "'g' is offered by standard and by standard"),
        ([ValueError("oh")], "resolver standard raised ValueError: oh"),
        ([ModelError("its own words")], "its own words"),
    ],
)
def test_a_faulty_resolver_is_named(model: nn.Module, answers: list[Any], part: str) -> None:
    with pytest.raises(EulerForgeError, match=part):
        resolve_groups(model, None, REPORT, [resolver(answer) for answer in answers])  # type: ignore[arg-type]


def test_without_phases_every_group_of_the_injection_trains() -> None:
    made = plan()
    assert [(one.step, one.groups) for one in made.phases] == [(0, ("lora", "attn_lora"))]
    assert made.trained_names == ("up.weight", "up.bias", "q.weight", "q.bias")


def test_a_phase_holds_from_its_step_to_the_next() -> None:
    made = plan(phase(0, "lora"), phase(5, "attn_lora"), phase(8, "lora", "base_ffn"))
    assert [made.at(step).step for step in (0, 4, 5, 7, 8, 99)] == [0, 0, 5, 5, 8, 8]
    assert made.names_of(made.at(8)) == ("up.weight", "up.bias", "base.weight")
    assert set(made.groups) == {"lora", "attn_lora", "base_ffn"}
    assert str(made.at(8)) == "from step 8: lora, base_ffn"


@pytest.mark.parametrize(
    ("phases", "kind", "message", "hint"),
    [
        ([phase(1, "lora")], ConfigError, "first phase must start at step 0", ""),
        ([phase(0, "lora"), phase(0, "attn_lora")], ConfigError, "must increase", ""),
        ([phase(0, "lora"), phase(5, "lora"), phase(3, "lora")], ConfigError, "must increase", ""),
        ([phase(0, "lroa")], ConfigError, "there is no group 'lroa'", "did you mean lora?"),
        ([phase(0, "zzz")], ConfigError, "there is no group 'zzz'", "attn_lora, base_ffn, empty, lora, router"),
        ([phase(0)], ConfigError, "No trainable parameters", ""),
        ([phase(0, "lora", "empty")], ModelError, "No trainable parameters in group empty", r"attn_lora \(2 tensors\)"),
        ([phase(0, "router")], ModelError, "No trainable parameters in group router", r"lora \(2 tensors\)"),
    ],
)
def test_phases_that_cannot_train(phases: list[Any], kind: type[EulerForgeError], message: str, hint: str) -> None:
    with pytest.raises(kind, match=message) as refused:
        plan(*phases)
    assert re.search(hint, refused.value.problems[0].hint or "")


def test_where_nothing_can_train_the_hint_names_the_layers() -> None:
    with pytest.raises(ModelError, match="No trainable parameters") as refused:
        plan(phase(0, "lora"), groups={"lora": ()}, layer_names=["gate_proj", "up_proj"])
    assert "gate_proj, up_proj" in (refused.value.problems[0].hint or "")


def test_an_empty_router_beside_others_is_a_warning() -> None:
    made = plan(phase(0, "lora", "router"), phase(2, "router", "lora"))
    assert made.warnings == ("the router group has no parameters in this model: the phases train without it",)
    assert "router" not in made.groups


def test_a_parameter_in_two_groups_is_refused() -> None:
    with pytest.raises(PluginError, match=r"up.weight is in two phase groups, lora and mine"):
        plan(phase(0, "lora", "mine"), groups={**GROUPS, "mine": ("up.weight",)})


def test_entering_a_phase_freezes_the_rest_and_takes_its_gradients_away(model: nn.Module) -> None:
    made = plan(phase(0, "lora"), phase(1, "attn_lora"))
    for step, wanted in ((0, GROUPS["lora"]), (1, GROUPS["attn_lora"])):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        trainable = enter_phase(model, made, made.at(step))
        named = dict(model.named_parameters())
        assert [id(parameter) for parameter in trainable] == [id(named[name]) for name in wanted]
        assert {name for name, parameter in named.items() if parameter.requires_grad} == set(wanted)
        assert {name for name, parameter in named.items() if parameter.grad is not None} == set(wanted)
