"""Dense LoRA: every matched linear module becomes a ``LoRALinear``, in place."""

from __future__ import annotations

import hashlib

import attrs
import torch
from torch import nn

from eulerforge.api import BackboneAdapter, InjectionContext, InjectionReport, SiteReport
from eulerforge.errors import ModelError
from eulerforge.lora.targets import Selection, Target, select_targets
from eulerforge.lora.wrap import wrap_linear
from eulerforge_strategy_dense_lora.config import DenseLoRAConfig

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
    """Wrap every linear module that the config's keywords reach with ``LoRALinear``.

    An attention projection gets the rank and alpha of ``attn_lora``, whichever list named it.
    Each adapter's initial values come from the seed and its path alone, so they do not depend on what else is adapted.

    Raises:
        ModelError: layers beyond the depth, a module that is not linear, or a second injection.
    """
    keywords = list(config.target_keywords)
    if config.attn_lora.enabled:
        keywords += [keyword for keyword in config.attn_lora.keywords if keyword not in keywords]
    selection = select_targets(model, adapter, config, keywords)
    for target in selection.targets:
        linear = isinstance(target.module, nn.Linear) or hasattr(target.module, "base_layer")
        if target.parameter is not None or not linear:
            raise ModelError(
                f"{target.path} is a {type(target.module).__name__}; dense_lora adapts linear modules only",
                hint=f"take {target.keyword!r} out of the keywords",
            )
    return _report(selection, tuple(_wrap(model, target, config, seed) for target in selection.targets))


def _wrap(model: nn.Module, target: Target, config: DenseLoRAConfig, seed: int) -> SiteReport:
    attention = target.role.startswith(ATTENTION_ROLES)
    r, alpha = config.lora_r, config.lora_alpha
    if attention:
        r = r if config.attn_lora.lora_r is None else config.attn_lora.lora_r
        alpha = alpha if config.attn_lora.lora_alpha is None else config.attn_lora.lora_alpha
    digest = hashlib.sha256(f"{seed}:{target.path}".encode()).digest()
    wrapper = wrap_linear(
        model,
        target.path,
        r=r,
        alpha=alpha,
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")),
    )
    return SiteReport(
        path=target.path,
        layer=target.layer,
        role=target.role,
        group="attn_lora" if attention else "lora",
        keyword=target.keyword,
        r=r,
        alpha=alpha,
        scaling=wrapper.scaling,
        in_features=wrapper.in_features,
        out_features=wrapper.out_features,
        parameters=(f"{target.path}.lora_A", f"{target.path}.lora_B"),
        parameter_count=wrapper.lora_A.numel() + wrapper.lora_B.numel(),
    )


def _report(selection: Selection, sites: tuple[SiteReport, ...]) -> InjectionReport:
    fields = attrs.asdict(selection, recurse=False, filter=lambda attribute, _: attribute.name != "targets")
    return InjectionReport(strategy="dense_lora", sites=sites, **fields)
