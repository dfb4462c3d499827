"""Dense LoRA: every matched linear module becomes a ``LoRALinear``, fused experts become ``LoRAExperts``, in place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import nn

from eulerforge.api import BackboneAdapter, InjectionContext, InjectionReport, SiteReport
from eulerforge.errors import ModelError
from eulerforge.lora.experts import ExpertsPath
from eulerforge.lora.linear import LoRALinear
from eulerforge.lora.targets import Selection, Target, select_targets
from eulerforge.lora.wrap import wrap_experts, wrap_linear
from eulerforge_strategy_dense_lora.config import AttentionLoRAConfig, DenseLoRAConfig

ATTENTION_ROLES = ("attn.", "linear_attn.")


class DenseLoRAInjection:
    """The strategy object behind ``injection.strategy = dense_lora``."""

    def inject(
        self, model: nn.Module, adapter: BackboneAdapter, config: DenseLoRAConfig, context: InjectionContext
    ) -> InjectionReport:
        return inject_dense_lora_inplace(model, adapter, config, seed=context.seed)


def inject_dense_lora_inplace(
    model: nn.Module, adapter: BackboneAdapter, config: DenseLoRAConfig, *, seed: int = 0
) -> InjectionReport:
    """Wrap what the config's keywords reach: linear modules with ``LoRALinear``, fused experts with ``LoRAExperts``.

    An attention projection gets the rank and alpha of ``attn_lora``, whichever list named it.
    Each adapter's initial values come from the seed and its path alone, so they do not depend on what else is adapted.

    Raises:
        ModelError: layers beyond the depth, a module that is neither, or a second injection.
    """
    keywords = list(config.target_keywords)
    if config.attn_lora.enabled:
        keywords += [keyword for keyword in config.attn_lora.keywords if keyword not in keywords]
    selection = select_targets(model, adapter, config, keywords)
    places: dict[str, list[Target]] = {}
    for target in selection.targets:
        linear = isinstance(target.module, nn.Linear) or hasattr(target.module, "base_layer")
        if target.parameter is None and not linear:
            raise ModelError(
                f"{target.path} is a {type(target.module).__name__}, neither a linear module nor fused experts",
                hint=f"take {target.keyword!r} out of the keywords",
            )
        # the fused parameters of one module share a wrapper
        places.setdefault(target.path, []).append(target)
    sites = tuple(site for targets in places.values() for site in _wrap(model, targets, config, seed))
    report = _report(selection, sites)
    return attrs.evolve(report, warnings=(*report.warnings, *_idle(config, sites)))


def _idle(config: DenseLoRAConfig, sites: tuple[SiteReport, ...]) -> list[str]:
    """What is written of ``attn_lora`` and does nothing, because it is off."""
    attention = config.attn_lora
    if attention.enabled:
        return []
    written = {"keywords": attention.keywords != AttentionLoRAConfig().keywords}
    if not any(site.group == "attn_lora" for site in sites):  # target_keywords may name attention projections too
        written |= {"lora_r": attention.lora_r is not None, "lora_alpha": attention.lora_alpha is not None}
    return [
        f"injection.attn_lora.{key} does nothing without --set injection.attn_lora.enabled=true"
        for key, is_written in written.items()
        if is_written
    ]


def _wrap(model: nn.Module, targets: list[Target], config: DenseLoRAConfig, seed: int) -> list[SiteReport]:
    """Wrap one module, and report each of its targets."""
    first = targets[0]
    attention = first.role.startswith(ATTENTION_ROLES)
    r, alpha = config.lora_r, config.lora_alpha
    if attention:
        r = r if config.attn_lora.lora_r is None else config.attn_lora.lora_r
        alpha = alpha if config.attn_lora.lora_alpha is None else config.attn_lora.lora_alpha
    common: dict[str, Any] = {
        "r": r,
        "alpha": alpha,
        "dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
    }
    if first.parameter is None:
        linear = wrap_linear(model, first.path, generator=_generator(seed, first.path), **common)
        return [_site(first, linear, linear.scaling, config=common, prefix=first.path)]
    named = {target.parameter: target for target in targets if target.parameter is not None}
    generators = {name: _generator(seed, f"{first.path}.{name}") for name in named}
    experts = wrap_experts(model, first.path, tuple(named), generators=generators, **common)
    return [
        _site(target, experts.paths[name], experts.scaling, config=common, prefix=f"{first.path}.{name}")
        for name, target in named.items()
    ]


def _site(
    target: Target, low_rank: LoRALinear | ExpertsPath, scaling: float, *, config: Mapping[str, Any], prefix: str
) -> SiteReport:
    return SiteReport(
        path=target.path,
        layer=target.layer,
        role=target.role,
        group="attn_lora" if target.role.startswith(ATTENTION_ROLES) else "lora",
        keyword=target.keyword,
        r=config["r"],
        alpha=config["alpha"],
        scaling=scaling,
        in_features=low_rank.in_features,
        out_features=low_rank.out_features,
        parameters=(f"{prefix}.lora_A", f"{prefix}.lora_B"),
        parameter_count=low_rank.lora_A.numel() + low_rank.lora_B.numel(),
        base_parameter=target.parameter,
    )


def _generator(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _report(selection: Selection, sites: tuple[SiteReport, ...]) -> InjectionReport:
    fields = attrs.asdict(selection, recurse=False, filter=lambda attribute, _: attribute.name != "targets")
    return InjectionReport(strategy="dense_lora", sites=sites, **fields)
