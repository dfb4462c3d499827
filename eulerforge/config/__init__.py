"""Presets: read with line numbers, overridden, structured strictly, with all problems at once."""

from eulerforge.config.load import LoadedConfig, load_run_config
from eulerforge.config.presets import ResolvedPreset, find_preset, list_presets
from eulerforge.config.schema import RunConfig

__all__ = ["LoadedConfig", "ResolvedPreset", "RunConfig", "find_preset", "list_presets", "load_run_config"]
