"""The plugin API's own version number, apart from the package version."""

from __future__ import annotations

API_VERSION = "1.0"


def parse(version: str) -> tuple[int, int]:
    """``"1.0"`` as (1, 0).

    Raises:
        ValueError: the text is not ``MAJOR.MINOR``.
    """
    major, dot, minor = version.partition(".")
    if not (dot and major.isdigit() and minor.isdigit()):
        raise ValueError(f"{version!r} is not of the form MAJOR.MINOR")
    return int(major), int(minor)


def is_compatible(plugin_version: str, core_version: str = API_VERSION) -> bool:
    """Same major number, and a minor number that the core already knows."""
    plugin, core = parse(plugin_version), parse(core_version)
    return plugin[0] == core[0] and plugin[1] <= core[1]
