"""The coverage of a run before a weight is read: the injection is rehearsed on a model that has shapes only.

What is wrong with the backbone, the keywords, the layers or the phases ends the run here, within seconds, however large
the model is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eulerforge.api import InjectionReport
from eulerforge.config.schema import RunConfig
from eulerforge.errors import EulerForgeError
from eulerforge.lora.apply import Injected, apply_injection
from eulerforge.models.meta import meta_model
from eulerforge.training.phases import (
    PhasePlan,
    plan_phases,
    refuse_untrained_adapters,
    refuse_untrained_bases,
    resolve_groups,
)

if TYPE_CHECKING:
    from eulerforge.plugins import Registry


def inject_and_plan(config: RunConfig, registry: Registry, model: Any) -> tuple[Injected, dict[str, Any], PhasePlan]:
    """Inject into ``model`` in place, resolve the phase groups and plan the phases.

    Raises:
        EulerForgeError: what the five functions raise that are called here.
    """
    injected = apply_injection(config, registry, model)
    groups = resolve_groups(model, injected.adapter, injected.report, registry.phase_resolvers())
    layer_names = tuple(dict.fromkeys(site.path.rpartition(".")[2] for site in injected.report.sites))
    planned = plan_phases(config.training, groups, injected.report, layer_names=layer_names)
    refuse_untrained_bases(model, planned)
    refuse_untrained_adapters(injected.report, planned)
    return injected, groups, planned


def rehearse(config: RunConfig, registry: Registry) -> InjectionReport | str:
    """The report of the injection that the run would make, or why only the loaded model can tell.

    A model or a strategy that looks at values cannot be rehearsed, because the meta device has none.

    Raises:
        EulerForgeError: the run would be refused.
    """
    try:
        injected, _, _ = inject_and_plan(config, registry, meta_model(config))
    except EulerForgeError as error:
        cause = error.__cause__
        if isinstance(cause, EulerForgeError) or "meta tensor" not in str(cause):
            raise
        return f"the coverage is checked after loading: {error}"
    return injected.report
