"""The kit on strategies and phase groups with one bug each: the right check fails, and names the bug.

The plugins are those that ``plugins new`` writes, in modules of their own; backbones are in tests/integration.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eulerforge.cli.plugins_new import KINDS, _values, render
from eulerforge.testing import Nonconforming, PhaseGroupConformance, PluginConformance, StrategyConformance
from eulerforge.testing.fault import listed, nearest, require
from eulerforge.testing.installed import registry
from eulerforge.testing.plugin import checks_of
from eulerforge.testing.tiny_models import tiny_model_of

Make = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Write a plugin of a kind with some texts changed, make it the only one installed; gives back its package."""
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)

    def written(kind: str, *changes: tuple[str, str]) -> str:
        values = _values(KINDS[kind], "kittest", "")
        texts = render(kind, values)
        for old, new in changes:
            assert sum(text.count(old) for text in texts.values()) >= 1, old
            texts = {path: text.replace(old, new) for path, text in texts.items()}
        for path, text in texts.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
        module = f"{values['package']}.plugin"
        entry = SimpleNamespace(
            name="kittest",
            value=module,
            dist=SimpleNamespace(name=values["distribution"], version="1"),
            load=lambda: importlib.import_module(module),
        )
        monkeypatch.setattr("eulerforge.plugins.discovery.installed_entry_points", lambda: [entry])
        return values["package"]

    registry.cache_clear()
    checks_of.cache_clear()
    yield written
    registry.cache_clear()
    checks_of.cache_clear()
    for name in set(sys.modules) - before:
        if "kittest" in name:
            del sys.modules[name]


def failures(case: Any, tmp_path: Path) -> dict[str, str]:
    """The message of every test of a kit class that fails."""
    found: dict[str, str] = {}
    for name in dir(case):
        if not name.startswith("test_"):
            continue
        function = getattr(case, name)
        wanted = function.__code__.co_varnames[1 : function.__code__.co_argcount]
        arguments = {"tmp_path": tmp_path / name, "model_type": "llama"}
        try:
            function(**{key: arguments[key] for key in wanted})
        except Nonconforming as fault:
            found[name] = str(fault)
    return found


def strategy_case(package: str, **attributes: Any) -> StrategyConformance:
    kind = type("Case", (StrategyConformance,), {"plugin": f"{package}.plugin", "strategy": "kittest", **attributes})
    case: StrategyConformance = kind()
    return case


def phases_case(package: str) -> PhaseGroupConformance:
    kind = type("Case", (PhaseGroupConformance,), {"plugin": f"{package}.plugin", "phase_groups": "kittest"})
    case: PhaseGroupConformance = kind()
    return case


def test_what_is_written_has_no_fault(make: Make, tmp_path: Path) -> None:
    package = make("strategy")
    assert failures(strategy_case(package), tmp_path) == {}
    assert failures(type("Case", (PluginConformance,), {"plugin": f"{package}.plugin"})(), tmp_path) == {}


FULL = "torch.full((self.out_features,), initial, device=self.weight.device)"
STRATEGY_BUGS = {
    "not the identity": (
        (("setting(1.0, gt=0", "setting(1.5, gt=0"),),
        "test_the_output_before_training",
        "the strategy kittest changes the output before training",
    ),
    "merge forgets": (
        (("return base_weight * self.scale.detach().to(base_weight)[:, None]", "return base_weight"),),
        "test_the_merged_model_equals_the_live_one",
        "merged and live model differ by",
    ),
    "detached": (
        (("scale = self.scale.to(y.dtype)", "scale = self.scale.detach().to(y.dtype)"),),
        "test_a_gradient_reaches_every_parameter",
        "with the strategy kittest raises RuntimeError",
    ),
    "reads the weight": (
        (("y = self.base_layer(x)", "y = nn.functional.linear(x, self.weight, self.bias)"),),
        "test_weights_that_are_stored_in_bf16",
        "a pass of the strategy kittest beside weights stored as bf16 raises RuntimeError",
    ),
    "rounds to the weight's precision": (
        (("y = self.base_layer(x)", "y = self.base_layer(x.to(self.weight.dtype).to(x.dtype))"),),
        "test_weights_that_are_stored_in_bf16",
        "of the strategy kittest differ beside weights that are stored as bf16",
    ),
    "unreal name": (
        (('f"{target.path}.scale"', 'f"{target.path}.scales"'),),
        "test_the_report_names_what_was_added",
        "mlp.down_proj.scales, no parameter of the model",
    ),
    "wrong count": (
        (("parameter_count=wrapper.out_features", "parameter_count=1"),),
        "test_the_report_names_what_was_added",
        "counts 1 parameters at model.layers.0.mlp.down_proj, which has 32",
    ),
    "undeclared group": (
        (('group="lora"', 'group="mine"'),),
        "test_the_report_is_of_the_strategy_and_the_model",
        "puts parameters into the group mine, which the spec does not declare",
    ),
    "other name": (
        (('strategy="kittest"', 'strategy="kitest"'),),
        "test_the_report_is_of_the_strategy_and_the_model",
        "the report names the strategy 'kitest', not 'kittest'",
    ),
    "silent keyword": (
        (("unmatched=selection.unmatched", "unmatched={}"),),
        "test_a_keyword_that_matches_nothing_is_reported",
        "kittest says nothing of a keyword that matches nothing",
    ),
    "global random state": (
        ((FULL, "torch.ones(self.out_features, device=self.weight.device) + 1e-9 * torch.randn(self.out_features)"),),
        "test_initial_values_come_from_the_seed_alone",
        "kittest draws from torch's global random state",
    ),
    "half precision": (
        ((FULL, "torch.full((self.out_features,), initial, device=self.weight.device, dtype=torch.bfloat16)"),),
        "test_the_report_names_what_was_added",
        "in another precision: adapters are fp32",
    ),
    "no device": (
        ((FULL, "torch.full((self.out_features,), initial)"),),
        "test_it_can_be_rehearsed_without_weights",
        "is not on the base's device",
    ),
    "base trains": (
        (
            (
                "        super().__init__(base_layer)\n",
                "        super().__init__(base_layer)\n        base_layer.requires_grad_()\n",
            ),
        ),
        "test_the_base_is_frozen",
        "the strategy kittest leaves the base trainable, model.layers.0.mlp.down_proj.base_layer.weight",
    ),
    "all layers": (
        (
            (
                "model, adapter, config, config.target_keywords)",
                "model, adapter, Everywhere(), config.target_keywords)",
            ),
            ("class ScaledLinear", "from eulerforge.api import InjectionConfig as Everywhere\n\n\nclass ScaledLinear"),
        ),
        "test_the_window_of_layers",
        "start_layer = 1, num_layers = 1 adapts layers [0, 1, 2]",
    ),
    "no help": (
        (('setting(1.0, gt=0, help="The factor that every output starts with; 1 changes nothing")', "1.0"),),
        "test_every_key_is_a_setting_with_help",
        "initial_scale of kittest has no help",
    ),
}


@pytest.mark.parametrize("name", STRATEGY_BUGS)
def test_a_bug_of_a_strategy_is_named(name: str, make: Make, tmp_path: Path) -> None:
    changes, test, said = STRATEGY_BUGS[name]
    found = failures(strategy_case(make("strategy", *changes)), tmp_path)
    assert said in found.get(test, ""), found


def test_identity_that_was_denied(make: Make, tmp_path: Path) -> None:
    found = failures(strategy_case(make("strategy"), starts_as_identity=False), tmp_path)
    assert list(found) == ["test_the_output_before_training"]
    assert "starts as the identity, though" in found["test_the_output_before_training"]


def test_settings_that_are_refused(make: Make, tmp_path: Path) -> None:
    found = failures(strategy_case(make("strategy"), settings={"initial_scale": -1.0}), tmp_path)
    assert "-1.0 is out of range" in found["test_the_settings_are_valid"]


PHASE_BUGS = {
    "unreal": (
        ("tuple(name for name", 'tuple(name + "s" for name'),
        "test_groups_name_real_parameters",
        "norm.weights",
    ),
    "undeclared": (
        ('return {"kittest": tuple(', 'return {"kitttest": tuple('),
        "test_only_declared_groups_and_all_of_them",
        "names the group 'kitttest', which it does not declare",
    ),
    "forgotten": (
        ('return {"kittest": tuple(name for name in norms if name not in injected)}', "return {}"),
        "test_only_declared_groups_and_all_of_them",
        "kittest declares the group kittest, which resolve does not answer for",
    ),
    "twice": (("in norms if", "in norms * 2 if"), "test_groups_are_disjoint", "twice: name each parameter once"),
    "empty": (
        ('if "norm" in name', 'if "nrom" in name'),
        "test_every_group_has_parameters_somewhere",
        "the group kittest is empty in llama, mixtral",
    ),
    "changes": (
        ("        injected = {", "        model.requires_grad_(True)\n        injected = {"),
        "test_resolving_changes_nothing",
        "resolving with kittest changes the model",
    ),
    "raises": (
        ("report.layers\n", "report.layer\n"),
        "test_groups_name_real_parameters",
        "resolving the groups of kittest is refused",
    ),
}


@pytest.mark.parametrize("name", PHASE_BUGS)
def test_a_bug_of_phase_groups_is_named(name: str, make: Make, tmp_path: Path) -> None:
    change, test, said = PHASE_BUGS[name]
    found = failures(phases_case(make("phases", change)), tmp_path)
    assert said in found.get(test, ""), found


def test_phase_groups_without_a_fault(make: Make, tmp_path: Path) -> None:
    assert failures(phases_case(make("phases")), tmp_path) == {}


def test_a_test_class_that_names_nothing(tmp_path: Path) -> None:
    with pytest.raises(Nonconforming, match="the test class names no plugin"):
        PluginConformance().test_it_is_installed_and_loads()


def test_a_fault_is_one_sentence() -> None:
    require(True, "never", "said")
    with pytest.raises(Nonconforming, match=r"^what is wrong: how to mend it$"):
        require(False, "what is wrong", "how to mend it")
    assert nearest("gate_prj", {"gate_proj", "up_proj"}) == "nearest is gate_proj"
    assert (nearest("x", {"b", "a"}), nearest("x", set())) == ("there are a, b", "there are none")
    assert listed(["a", "b", "c", "d", "e", "f"]) == "a, b, c, d and 2 more"


@pytest.mark.parametrize(
    ("model_type", "kind"), [("olmo2", "Olmo2ForCausalLM"), ("gemma3", "Gemma3ForConditionalGeneration")]
)
def test_a_tiny_model_of_any_family(model_type: str, kind: str) -> None:
    model = tiny_model_of(model_type)
    assert type(model).__name__ == kind
    assert model.config.model_type == model_type
    assert not model.training
    with pytest.raises(ValueError, match="no_such_family"):
        tiny_model_of("no_such_family")
