"""Adapter and strategy of a run, applied to its model, with every gap in the coverage reported before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
from torch import nn

from eulerforge.api import BackboneAdapter, BackboneSpec, InjectionContext, InjectionReport, Problem
from eulerforge.errors import EulerForgeError, ModelError, PluginError
from eulerforge.models.linear_ops import linear_ops_from
from eulerforge.models.load import model_types

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


def apply_injection(run: RunConfig, registry: Registry, model: nn.Module) -> Injected:
    """Freeze the base, inject in place, and refuse what would waste a run.

    Raises:
        ModelError: the backbone does not fit, a keyword reaches nothing or only some layers, nothing is trainable.
        PluginError: a plugin is missing, or it raised; the message names it.
    """
    spec, partial_ok = _backbone(run, registry, model)
    adapter = registry.create(spec)
    strategy_spec = registry.strategy(run.strategy)
    strategy = registry.create(strategy_spec)
    model.requires_grad_(False)
    context = InjectionContext(seed=run.seed, linear_ops=linear_ops_from(registry), partial_ok=partial_ok)
    try:
        report = strategy.inject(model, adapter, run.injection, context)
    except EulerForgeError:
        raise
    except Exception as error:
        raise PluginError(
            f"strategy {strategy_spec.name} on backbone {spec.name} raised {type(error).__name__}: {error}",
            hint="--debug shows the traceback; report it to the plugin's author",
        ) from error
    _refuse_gaps(run, report, partial_ok)
    warnings = [*report.warnings, *(_partial_line(keyword, gap, report) for keyword, gap in report.partial.items())]
    if partial_ok and report.partial:
        right = registry.backbone_for(model_types(model.config)[0])
        if right is not None and right.name != spec.name:
            warnings.append(f"backbone = {right.name} reaches all layers of this model")
    return Injected(report=report, adapter=adapter, backbone=spec, warnings=tuple(warnings))


def _backbone(run: RunConfig, registry: Registry, model: Any) -> tuple[BackboneSpec, bool]:
    """The backbone's spec, and whether it declares that it reaches only a part of this model."""
    types = model_types(model.config)
    fitting = next((found for kind in types if (found := registry.backbone_for(kind)) is not None), None)
    if run.backbone == "auto":
        if fitting is None:
            raise PluginError(
                f"no installed backbone covers model_type {types[0]!r}",
                key="backbone",
                hint="eulerforge plugins list shows what is there; install or write a backbone plugin",
            )
        return fitting, False
    spec = registry.backbone(run.backbone)
    if any(kind in spec.model_types for kind in types):
        return spec, False
    if any(kind in spec.partial_model_types for kind in types):
        return spec, True
    raise ModelError(
        f"backbone {spec.name} does not fit {run.model_name}, whose model_type is {types[0]!r}",
        key="backbone",
        hint=f"--set backbone={fitting.name}" if fitting else "eulerforge plugins list shows the installed backbones",
    )


def _partial_line(keyword: str, gap: tuple[int, ...], report: InjectionReport) -> str:
    reached = len(report.layers) - len(gap)
    return f"{keyword} reaches {reached} of {len(report.layers)} layers; not reached: {_ranges(gap)}"


def _ranges(indices: tuple[int, ...]) -> str:
    """(0, 1, 2, 4) as "0-2, 4"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _refuse_gaps(run: RunConfig, report: InjectionReport, partial_ok: bool) -> None:
    if not report.sites:
        near = "; ".join(f"{keyword}: nearest are {', '.join(names)}" for keyword, names in report.unmatched.items())
        raise ModelError(
            "No trainable parameters: no keyword matches a linear layer of the model",
            key="injection.target_keywords",
            hint=near or "name at least one target keyword",
        )
    problems = [
        Problem(
            message=f"the keyword {keyword!r} matches nothing in the chosen layers",
            key="injection",
            hint=f"nearest names in the model: {', '.join(names)}",
        )
        for keyword, names in report.unmatched.items()
    ]
    if not (partial_ok or run.injection.allow_partial):
        problems += [
            Problem(
                message=_partial_line(keyword, gap, report),
                key="injection",
                hint="--set injection.allow_partial=true trains with this coverage",
            )
            for keyword, gap in report.partial.items()
        ]
    if problems:
        raise ModelError.of(problems)
