"""Scale the outputs of linear layers: y = scale * (W x) + b, with one trained factor per output.

It stands on ``AdaptedLinear``, so merging, saving and unwrapping work without a word more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from eulerforge.api import BackboneAdapter, InjectionContext, InjectionReport, SiteReport
from eulerforge.lora.adapted import AdaptedLinear
from eulerforge.lora.targets import Target, select_targets
from eulerforge.lora.wrap import replace_module
from eulerforge_demo.config import DemoScaleConfig


class ScaledLinear(AdaptedLinear):
    """A frozen linear module and ``output_scale``, shape (out_features,), fp32."""

    def __init__(self, base_layer: nn.Module, initial: float) -> None:
        super().__init__(base_layer)
        self.output_scale = nn.Parameter(torch.full((self.out_features,), initial, device=self.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.output_scale.to(x.dtype)
        y = self.base_layer(x)
        # the bias stays out of it, so that a merge changes the weight alone
        return y * scale if self.bias is None else (y - self.bias) * scale + self.bias

    def merged_weight(self, base_weight: torch.Tensor) -> torch.Tensor:
        return base_weight * self.output_scale.detach().to(base_weight)[:, None]


class DemoScale:
    """The strategy object behind ``injection.strategy = demo_scale``."""

    def inject(
        self, model: nn.Module, adapter: BackboneAdapter, config: DemoScaleConfig, context: InjectionContext
    ) -> InjectionReport:
        selection = select_targets(model, adapter, config, config.target_keywords)
        return InjectionReport(
            strategy="demo_scale",
            sites=tuple(self._wrap(model, target, config) for target in selection.targets),
            layers=selection.layers,
            depth=selection.depth,
            unmatched=selection.unmatched,
            partial=selection.partial,
        )

    def _wrap(self, model: nn.Module, target: Target, config: DemoScaleConfig) -> SiteReport:
        wrapper = ScaledLinear(target.module, config.initial_scale)
        replace_module(model, target.path, wrapper)
        return SiteReport(
            path=target.path,
            layer=target.layer,
            role=target.role,
            group="scale",
            keyword=target.keyword,
            r=0,
            alpha=1.0,
            scaling=1.0,
            in_features=wrapper.in_features,
            out_features=wrapper.out_features,
            parameters=(f"{target.path}.output_scale",),
            parameter_count=wrapper.out_features,
        )


class ScaleGroup:
    """The phase group ``scale``: all that ``demo_scale`` injected."""

    def resolve(
        self, model: nn.Module, adapter: BackboneAdapter, report: InjectionReport
    ) -> Mapping[str, Sequence[str]]:
        return {"scale": report.groups.get("scale", ())}
