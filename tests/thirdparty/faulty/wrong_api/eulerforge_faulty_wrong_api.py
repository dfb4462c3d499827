"""A plugin for an API of the future."""

from __future__ import annotations

from eulerforge.api import PresetSpec, hookimpl

EULERFORGE_API = "2.0"


@hookimpl
def eulerforge_presets() -> list[PresetSpec]:
    return []
