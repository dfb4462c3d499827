"""Whether a phase-group resolver names real parameters, each in one group, and only groups that it declares."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from eulerforge.api import BackboneAdapter, InjectionReport, PhaseGroupSpec
from eulerforge.models.layout import MixtureAdapter
from eulerforge.plugins.groups import DeclaredGroups
from eulerforge.testing.fault import blamed, listed, nearest, require
from eulerforge.testing.installed import made, offer_of
from eulerforge.testing.probe import inject, loud
from eulerforge.testing.tiny_models import tiny_model_of


class PhaseGroupConformance:
    """Inherit it in a class whose name starts with ``Test``.

    ``plugin`` is the entry module, ``phase_groups`` the name in the spec.
    ``model_types`` are the families that it is tried on: dense and mixture, so that routers are seen too.
    ``may_be_empty`` are groups that have no parameter in any of them.
    """

    plugin = ""
    phase_groups = ""
    model_types: tuple[str, ...] = ("llama", "mixtral")
    may_be_empty: Collection[str] = ()

    def backbone(self) -> BackboneAdapter:
        """The adapter of ``model_types``; the default knows dense models and mixtures of Llama's layout."""
        return MixtureAdapter()

    def inject(self, model: Any) -> InjectionReport:
        """Inject in place; the default is plain LoRA on every place, in the groups ``lora`` and ``attn_lora``."""
        return inject(model, self.backbone())

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """A test that takes ``model_type`` runs for each of the class."""
        if "model_type" in metafunc.fixturenames:
            metafunc.parametrize("model_type", self.model_types or ("none",))

    def spec(self) -> PhaseGroupSpec:
        spec = offer_of(self.plugin, "phase_group", self.phase_groups).spec
        assert isinstance(spec, PhaseGroupSpec)  # noqa: S101 - for the type checker; offer_of looked for the kind
        return spec

    def resolved(self, model_type: str) -> tuple[Any, dict[str, tuple[str, ...]]]:
        """An injected model and the resolver's answer, held to the declared groups."""
        offer, spec = offer_of(self.plugin, "phase_group", self.phase_groups), self.spec()
        model = loud(tiny_model_of(model_type))
        report = self.inject(model)
        resolver = DeclaredGroups(made(offer), spec, spec.groups, self.plugin)
        with blamed(f"resolving the groups of {self.phase_groups}", "resolve gives {group: names of parameters}"):
            return model, {
                group: tuple(names) for group, names in resolver.resolve(model, self.backbone(), report).items()
            }

    def test_only_declared_groups_and_all_of_them(self, model_type: str) -> None:
        """It answers for the groups that its spec declares, and for no other."""
        _, groups = self.resolved(model_type)
        missing = [group for group in self.spec().groups if group not in groups]
        require(
            not missing,
            f"{self.phase_groups} declares the group {listed(missing)}, which resolve does not answer for",
            "give it, empty where the model has nothing of it, or take it out of PhaseGroupSpec",
        )

    def test_groups_name_real_parameters(self, model_type: str) -> None:
        """Every name is a parameter of the injected model."""
        model, groups = self.resolved(model_type)
        known = {name for name, _ in model.named_parameters()}
        for group, names in groups.items():
            unreal = [name for name in names if name not in known]
            require(
                not unreal,
                f"the group {group} names {listed(unreal)}, no parameter of the model"
                f" ({nearest(unreal[0], known) if unreal else ''})",
                "spell names as model.named_parameters() does after the injection",
            )

    def test_groups_are_disjoint(self, model_type: str) -> None:
        """A parameter is in one group, once."""
        _, groups = self.resolved(model_type)
        owner: dict[str, str] = {}
        for group, names in groups.items():
            for name in names:
                first = owner.setdefault(name, group)
                require(first == group, f"{name} is in the groups {first} and {group}", "a parameter has one group")
            twice = sorted({name for name in names if names.count(name) > 1})
            require(not twice, f"the group {group} names {listed(twice)} twice", "name each parameter once")

    def test_every_group_has_parameters_somewhere(self) -> None:
        """No group is empty in all models."""
        answers = [self.resolved(model_type)[1] for model_type in self.model_types]
        empty = [
            group
            for group in self.spec().groups
            if group not in self.may_be_empty and not any(groups.get(group) for groups in answers)
        ]
        require(
            not empty,
            f"the group {listed(empty)} is empty in {listed(self.model_types)}",
            "find its parameters, add a model_type that has some, or write may_be_empty in the test class",
        )

    def test_resolving_changes_nothing(self, model_type: str) -> None:
        """It keeps no state and changes nothing."""
        model, first = self.resolved(model_type)
        untouched = loud(tiny_model_of(model_type))
        self.inject(untouched)
        trains = {name: parameter.requires_grad for name, parameter in untouched.named_parameters()}
        same = all(trains.get(name) == parameter.requires_grad for name, parameter in model.named_parameters())
        state, plain = model.state_dict(), untouched.state_dict()
        same = same and all(torch.equal(state[name], plain[name]) for name in plain)
        require(same, f"resolving with {self.phase_groups} changes the model", "a resolver only looks")
        _, second = self.resolved(model_type)
        require(first == second, f"{self.phase_groups} gives two answers for one model", "a resolver keeps no state")
