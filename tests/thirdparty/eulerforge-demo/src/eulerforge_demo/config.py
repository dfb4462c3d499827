"""The keys of ``injection`` when its strategy is ``demo_scale``."""

from __future__ import annotations

import attrs

from eulerforge.api import InjectionConfig, setting


@attrs.frozen(kw_only=True)
class DemoScaleConfig(InjectionConfig):
    """Where comes from the base class; what is one key of our own."""

    target_keywords: tuple[str, ...] = setting(("down_proj",), help="Names of the projections whose outputs are scaled")
    initial_scale: float = setting(1.0, gt=0, help="The factor that every output starts with; 1 changes nothing")
