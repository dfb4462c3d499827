"""Adapter and strategy of a run, applied to its model, with every gap in the coverage reported before training.

The coverage is measured here, from what the strategy says that it adapted and what the backbone says that there is, so
a third party's strategy that leaves something out is caught as well.
A gap is an error; ``injection.allow_partial = true`` makes it a warning that the report records.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
from torch import nn

from eulerforge.api import BackboneAdapter, BackboneSpec, InjectionContext, InjectionReport, Problem, Site
from eulerforge.api.report import ranges
from eulerforge.errors import EulerForgeError, ModelError, PluginError
from eulerforge.lora.coverage import Gap, Place, layer_names, uncovered
from eulerforge.lora.experts import LoRAExperts
from eulerforge.lora.wrap import adapted_modules
from eulerforge.models.linear_ops import linear_ops_from
from eulerforge.models.load import model_types
from eulerforge.models.processor import QUANTIZED_MODES
from eulerforge.models.quantized import quantizes_experts
from eulerforge.models.stored import widen

if TYPE_CHECKING:
    from eulerforge.config.schema import RunConfig
    from eulerforge.plugins import Registry


@attrs.frozen(kw_only=True)
class Injected:
    """What an injection gave: the report, the adapter that found the places, and what the user should hear."""

    report: InjectionReport
    adapter: BackboneAdapter
    backbone: BackboneSpec
    warnings: tuple[str, ...]


@attrs.frozen(kw_only=True)
class _Chosen:
    """The backbone of a run: ``fitting`` covers the model; ``misfit`` says why ``spec`` does not; ``partial_ok`` is the
    backbone's own word that it reaches only a part."""

    spec: BackboneSpec
    fitting: BackboneSpec | None
    partial_ok: bool = False
    misfit: Problem | None = None


@attrs.frozen
class _Before:
    """The layers' names and their sites, as they are before the injection."""

    prefixes: tuple[str, ...]
    sites: tuple[tuple[Site, ...], ...]

    @classmethod
    def of(cls, model: nn.Module, adapter: BackboneAdapter) -> _Before:
        layers = list(adapter.find_transformer_layers(model))
        prefixes = layer_names(model, adapter, layers)
        return cls(prefixes, tuple(tuple(adapter.find_sites(layer)) for layer in layers))


def apply_injection(run: RunConfig, registry: Registry, model: nn.Module) -> Injected:
    """Freeze the base, inject in place, and refuse what would waste a run; ``model`` may be on the meta device.

    Raises:
        ModelError: the backbone does not fit, a keyword reaches nothing or only some layers, the vision tower is
            reached, nothing is trainable.
        PluginError: a plugin is missing, or it raised; the message names it.
    """
    chosen = _backbone(run, registry, model)
    if chosen.misfit is not None and not run.injection.allow_partial:
        raise ModelError.of([chosen.misfit])
    adapter = registry.create(chosen.spec)
    strategy_spec = registry.strategy(run.strategy)
    strategy = registry.create(strategy_spec)
    model.requires_grad_(False)
    if not strategy_spec.stored_weights:
        widen(model)
    context = InjectionContext(
        seed=run.seed, linear_ops=linear_ops_from(registry), partial_ok=chosen.partial_ok or run.injection.allow_partial
    )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is data
            # looked at before the injection: an adapter need not know what a wrapper is
            before = _Before.of(model, adapter)
            report = strategy.inject(model, adapter, run.injection, context)
    except EulerForgeError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"strategy {strategy_spec.name} on backbone {chosen.spec.name} raised {type(error).__name__}: {error}",
            hint="--debug shows the traceback; report it to the plugin's author",
        ) from error
    if not strategy_spec.stored_weights and run.model.load_precision.mode in QUANTIZED_MODES:
        _refuse_own_experts(model, strategy_spec.name, run.model.load_precision.mode)
    report, faults, partial = _measured(run, model, adapter, report, before)
    if not report.sites:
        raise _nothing_trains(report, partial)
    refused = faults if chosen.partial_ok else [*faults, *partial]
    allowed = run.injection.allow_partial
    if refused and not allowed:
        raise ModelError.of(refused)
    misfit = [] if chosen.misfit is None else [chosen.misfit]
    gaps = tuple(problem.message for problem in (*misfit, *faults, *partial))
    report = attrs.evolve(report, gaps=gaps, allow_partial=allowed)
    warnings = [*report.warnings, *gaps]
    if gaps and chosen.fitting is not None and chosen.fitting.name != chosen.spec.name:
        warnings.append(f"backbone = {chosen.fitting.name} reaches all layers of this model")
    return Injected(report=report, adapter=adapter, backbone=chosen.spec, warnings=tuple(warnings))


def _backbone(run: RunConfig, registry: Registry, model: Any) -> _Chosen:
    types = model_types(model.config)
    if run.backbone == "auto":
        fitting = next((found for kind in types if (found := registry.backbone_for(kind)) is not None), None)
        if fitting is None:
            raise PluginError(
                f"no installed backbone covers model_type {types[0]!r}",
                key="backbone",
                hint="eulerforge plugins list shows what is there; install or write a backbone plugin",
            )
        return _Chosen(spec=fitting, fitting=fitting)
    spec = registry.backbone(run.backbone)
    # several may cover the type, of which the user has named one
    fitting = next((covering[0] for kind in types if (covering := registry.backbones_for(kind))), None)
    if any(kind in spec.model_types for kind in types):
        return _Chosen(spec=spec, fitting=spec)
    if any(kind in spec.partial_model_types for kind in types):
        return _Chosen(spec=spec, fitting=fitting, partial_ok=True)
    misfit = Problem(
        message=f"backbone {spec.name} does not fit {run.model_name}, whose model_type is {types[0]!r}",
        key="backbone",
        hint=f"--set backbone={fitting.name}" if fitting else "eulerforge plugins list shows the installed backbones",
    )
    return _Chosen(spec=spec, fitting=fitting, misfit=misfit)


def _measured(
    run: RunConfig, model: nn.Module, adapter: BackboneAdapter, report: InjectionReport, before: _Before
) -> tuple[InjectionReport, list[Problem], list[Problem]]:
    """The report with what the core itself measured, what is wrong with it, and what it covers in part only."""
    prefixes = before.prefixes
    sites = {index: before.sites[index] for index in report.layers}
    adapted = {
        Place(site.layer, site.path.removeprefix(f"{prefixes[site.layer]}."), site.base_parameter)
        for site in report.sites
    }
    keywords = report.keywords or tuple(run.injection.target_keywords)
    gaps = uncovered(adapter, sites, [word for word in keywords if word not in report.unmatched], adapted)
    present: dict[str, tuple[int, ...]] = {}
    for index, found in sites.items():
        for role in dict.fromkeys(site.role for site in found):
            present[role] = (*present.get(role, ()), index)
    partial = {**report.partial, **dict.fromkeys(keywords, ()), **{word: gap.layers for word, gap in gaps.items()}}
    measured = attrs.evolve(
        report,
        keywords=keywords,
        present=present,
        partial={word: missed for word, missed in partial.items() if missed},
    )
    faults = _vision_problems(model, report)
    faults += [_unmatched_problem(model, prefixes, word, names) for word, names in report.unmatched.items()]
    return measured, faults, [_gap_problem(run, sites, word, gaps.get(word), report) for word in measured.partial]


def _gap_problem(
    run: RunConfig, sites: Mapping[int, tuple[Site, ...]], keyword: str, gap: Gap | None, report: InjectionReport
) -> Problem:
    if gap is None:  # a keyword of the strategy's own, which only it can measure
        gap = Gap(report.partial[keyword], report.partial[keyword], {})
    message = f"{keyword} reaches {len(sites) - len(gap.untouched)} of {len(sites)} layers"
    if gap.untouched:
        message += f"; not reached: {ranges(gap.untouched)}"
    if gap.left_out:
        roles = ", ".join(f"{role} in {ranges(layers)}" for role, layers in gap.left_out.items())
        exact = run.injection.match == "exact" and not any(
            site.name == keyword and site.role in gap.left_out for found in sites.values() for site in found
        )
        why = "which only injection.match = role translates" if exact else f"which strategy {report.strategy} skips"
        message += f"; left out: {roles}, {why}"
    return Problem(
        message=message, key="injection", hint="--set injection.allow_partial=true trains with this coverage"
    )


def _unmatched_problem(model: nn.Module, prefixes: tuple[str, ...], keyword: str, names: tuple[str, ...]) -> Problem:
    message = f"the keyword {keyword!r} matches nothing in the chosen layers"
    inside = tuple(f"{prefix}." for prefix in prefixes)
    for path, module in model.named_modules():
        linear = isinstance(getattr(module, "base_layer", module), nn.Linear)
        if linear and path.rpartition(".")[2] == keyword and not path.startswith(inside):
            message += f"; {path} lies outside the decoder layers and is never adapted"
            break
    return Problem(message=message, key="injection", hint=f"nearest names in the model: {', '.join(names)}")


def _refuse_own_experts(model: nn.Module, strategy: str, mode: str) -> None:
    """Refuse a strategy whose own wrappers would read quantized experts as numbers: int8 ones would only be wrong.

    Raises:
        ModelError: it names the first.
    """
    for path, module in adapted_modules(model):
        if not isinstance(module, LoRAExperts) and quantizes_experts(module.base_layer):
            raise ModelError(
                f"{mode} stores the experts at {path} in another form, which the strategy {strategy} may read itself",
                key="model.load_precision.mode",
                hint="--set model.load_precision.mode=bf16, or a strategy whose StrategySpec says stored_weights",
            )


def _vision_problems(model: Any, report: InjectionReport) -> list[Problem]:
    """Adapted paths that belong neither to the language stack nor to the output head of a multimodal model."""
    get_decoder = getattr(model, "get_decoder", None)
    if not callable(get_decoder) or model.config.get_text_config() is model.config:
        return []
    inside = {id(module) for module in get_decoder().modules()}
    head = model.get_output_embeddings()
    inside |= {id(module) for module in head.modules()} if isinstance(head, nn.Module) else set()
    outside = [site.path for site in report.sites if id(model.get_submodule(site.path)) not in inside]
    if not outside:
        return []
    return [
        Problem(
            message=f"{len(outside)} adapted modules lie outside the language stack (vision tower), {outside[0]} first",
            key="injection",
            hint="a plugin reaches into the vision tower: use another one (--set backbone=auto)",
        )
    ]


def _nothing_trains(report: InjectionReport, partial: list[Problem]) -> ModelError:
    near = "; ".join(f"{keyword}: nearest are {', '.join(names)}" for keyword, names in report.unmatched.items())
    skipped = "; ".join(problem.message for problem in partial)
    return ModelError(
        f"No trainable parameters: {skipped or 'no keyword matches a linear layer of the model'}",
        key="injection.target_keywords",
        hint=near or "name at least one target keyword, and a strategy that adapts what it reaches",
    )
