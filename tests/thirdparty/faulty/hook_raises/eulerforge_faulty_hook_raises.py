"""A hook that raises."""

from __future__ import annotations

from eulerforge.api import PresetSpec, hookimpl

EULERFORGE_API = "1.0"


@hookimpl
def eulerforge_presets() -> list[PresetSpec]:
    raise OSError("the list of presets is on a disk that is not mounted")
