"""Entry module: declares the resolver and imports nothing heavy."""

from __future__ import annotations

from eulerforge.api import PhaseGroupSpec, hookimpl

EULERFORGE_API = "1.0"


@hookimpl
def eulerforge_phase_groups() -> list[PhaseGroupSpec]:
    return [
        PhaseGroupSpec(
            name="standard",
            target="eulerforge_phases.resolver:StandardGroups",
            summary="What a strategy injected, by its groups, and the base's routers and feed-forward weights",
            groups=("lora", "attn_lora", "router", "base_ffn"),
        )
    ]
