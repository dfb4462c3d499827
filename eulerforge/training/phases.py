"""When which parameters train: group names to parameters, and the phases of a run.

A phase begins at an optimizer step. Whatever it does not name is frozen without a gradient, so neither the update nor
weight decay touches it, and it stays bit-identical until a phase names it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from eulerforge.api import BackboneAdapter, InjectionReport, SiteReport
from eulerforge.config.phase_checks import phase_problems
from eulerforge.config.schema import TrainingConfig
from eulerforge.errors import ConfigError, EulerForgeError, ModelError, PluginError, Problem
from eulerforge.lora.wrap import adapted_modules

Groups = Mapping[str, tuple[str, ...]]


@attrs.frozen
class Phase:
    """From optimizer step ``step`` on, exactly these groups train."""

    step: int
    groups: tuple[str, ...]

    def __str__(self) -> str:
        return f"from step {self.step}: {', '.join(self.groups)}"


@attrs.frozen
class PhasePlan:
    """The phases in order, the first at step 0, and the parameter names of every group that ever trains."""

    phases: tuple[Phase, ...]
    groups: Groups
    warnings: tuple[str, ...] = ()

    def at(self, step: int) -> Phase:
        return [phase for phase in self.phases if phase.step <= step][-1]

    @property
    def trained_names(self) -> tuple[str, ...]:
        return tuple(name for names in self.groups.values() for name in names)

    def names_of(self, phase: Phase) -> tuple[str, ...]:
        return tuple(name for group in phase.groups for name in self.groups.get(group, ()))


def resolve_groups(
    model: nn.Module,
    adapter: BackboneAdapter,
    report: InjectionReport,
    resolvers: Sequence[tuple[Any, Any]],
) -> dict[str, tuple[str, ...]]:
    """Parameter names of every group that the resolvers offer, and of the strategy's own groups.

    Args:
        resolvers: pairs of PhaseGroupSpec and resolver.

    Raises:
        PluginError: two resolvers offer one group, a resolver raised, or it named what is not a parameter.
    """
    known = {name for name, _ in model.named_parameters()}
    found: dict[str, tuple[str, ...]] = {}
    offered_by: dict[str, str] = {}
    for spec, resolver in resolvers:
        try:
            answer = dict(resolver.resolve(model, adapter, report))
        except EulerForgeError:
            raise
        except Exception as error:
            raise PluginError(
                f"phase group resolver {spec.name} raised {type(error).__name__}: {error}",
                hint="--debug shows the traceback; report it to the plugin's author",
            ) from error
        for group, names in answer.items():
            if group in found:
                raise PluginError(
                    f"the phase group {group!r} is offered by {offered_by[group]} and by {spec.name}",
                    key="training.phases",
                    hint="switch one of the two plugins off with --no-plugin",
                )
            unknown = [name for name in names if name not in known]
            if unknown:
                raise PluginError(
                    f"phase group resolver {spec.name}: {unknown[0]!r} is not a parameter of the model",
                    hint="its resolve must give names of model.named_parameters(); tell the plugin's author",
                )
            found[group], offered_by[group] = tuple(names), spec.name
    for group, names in report.groups.items():
        found.setdefault(group, names)
    return found


def plan_phases(
    training: TrainingConfig, groups: Groups, report: InjectionReport, *, layer_names: Iterable[str] = ()
) -> PhasePlan:
    """The phases of a run; without any, one phase that trains every group of the injection.

    Args:
        layer_names: names of the model's linear modules, for the hint when nothing is trainable.

    Raises:
        ConfigError: what is wrong with the phases whatever the model is, as at validation.
        ModelError: "No trainable parameters".
    """
    errors, _ = phase_problems(training, strategy=report.strategy, own=report.groups, offered=groups)
    if errors:
        raise ConfigError.of(errors)
    planned = [Phase(phase.step, tuple(phase.trainable)) for phase in training.phases] or [
        Phase(0, tuple(group for group in report.groups if groups.get(group)))
    ]
    warnings = []
    for phase in planned:
        warnings += _refuse_empty(phase, groups, tuple(layer_names))
    used = dict.fromkeys(group for phase in planned for group in phase.groups)
    trained = {group: groups[group] for group in used if groups[group]}
    _refuse_overlap(trained)
    return PhasePlan(tuple(planned), trained, tuple(dict.fromkeys(warnings)))


def _refuse_empty(phase: Phase, groups: Groups, layer_names: tuple[str, ...]) -> list[str]:
    """Refuse a group without parameters; only a router may lack beside groups that train, and is warned of."""
    some = any(groups[group] for group in phase.groups)
    empty = [group for group in phase.groups if not groups[group]]
    if some and empty == ["router"]:
        return ["the router group has no parameters in this model: the phases train without it"]
    if some and not empty:
        return []
    there = ", ".join(f"{name} ({len(names)} tensors)" for name, names in groups.items() if names)
    hint = f"groups with parameters: {there}" if there else f"layer names: {', '.join(layer_names)}"
    which = f" in group {', '.join(empty)}" if empty else ""
    raise ModelError(
        f"No trainable parameters{which} (phase from step {phase.step})",
        key="training.phases",
        hint=hint,
    )


def refuse_untrained_bases(model: nn.Module, plan: PhasePlan) -> None:
    """Raises ConfigError where a phase trains weights below a wrapper that gives them no gradient."""
    for path, module in adapted_modules(model):
        if module.trains_base:
            continue
        for group, names in plan.groups.items():
            below = [name for name in names if name.startswith(f"{path}.base_layer.")]
            if below:
                raise ConfigError(
                    f"the group {group} cannot train {below[0]}: a {type(module).__name__} gives its base no gradient",
                    key="training.phases",
                    hint=f"take {group} out of training.phases, or the keywords of {path.rpartition('.')[2]} out of"
                    " injection.target_keywords",
                )


def refuse_untrained_adapters(report: InjectionReport, plan: PhasePlan) -> None:
    """Raises ConfigError where adapters train in no phase: they would cost memory and change nothing."""
    trained = set(plan.trained_names)
    idle: dict[str, list[SiteReport]] = {}
    for site in report.sites:
        if trained.isdisjoint(site.parameters):
            idle.setdefault(site.group, []).append(site)
    problems = []
    for group, sites in idle.items():
        keywords = ", ".join(dict.fromkeys(site.keyword for site in sites))
        problems.append(
            Problem(
                key="training.phases",
                message=f"no phase trains the group {group}: its {len(sites):,} adapters ({keywords}) would stay as"
                " they begin, without effect",
                hint=f"add {group} to the trainable of a phase, or take {keywords} out of the keywords of injection",
            )
        )
    if problems:
        raise ConfigError.of(problems)


def _refuse_overlap(groups: Groups) -> None:
    owner: dict[str, str] = {}
    for group, names in groups.items():
        for name in names:
            if owner.setdefault(name, group) != group:
                raise PluginError(
                    f"{name} is in two phase groups, {owner[name]} and {group}",
                    key="training.phases",
                    hint="name one of the two groups only, or switch one plugin off with --no-plugin",
                )


def enter_phase(model: nn.Module, plan: PhasePlan, phase: Phase) -> list[nn.Parameter]:
    """Freeze what the phase does not name; give back its trainable parameters."""
    wanted = set(plan.names_of(phase))
    trainable = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
        if name in wanted:
            trainable.append(parameter)
        else:
            parameter.grad = None
    return trainable
