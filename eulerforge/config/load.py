"""From ``--preset`` and ``--set`` to a checked ``RunConfig`` in which every value knows where it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from eulerforge.api import InjectionConfig, PresetSpec
from eulerforge.config.document import Document, read_document
from eulerforge.config.emit import toml_text
from eulerforge.config.location import expanded
from eulerforge.config.overrides import SOURCE, apply_overrides
from eulerforge.config.presets import find_preset
from eulerforge.config.schema import RunConfig
from eulerforge.config.structure import Structurer, as_tree, leaf_keys
from eulerforge.errors import ConfigError, PluginError, Problem

DEFAULT_STRATEGY = "dense_lora"


@attrs.frozen(kw_only=True)
class LoadedConfig:
    """A run's configuration; ``provenance`` maps each dotted key to ``default``, ``file:line`` or ``--set``."""

    run: RunConfig
    provenance: Mapping[str, str]
    preset_name: str
    preset_path: Path | None
    notes: tuple[str, ...] = ()

    def to_toml(self, *, comments: bool = True) -> str:
        """The whole configuration as a preset; with ``comments`` every key says where its value came from."""
        tree = as_tree(self.run)
        tree["injection"] = {"strategy": tree.pop("strategy"), **tree["injection"]}
        return toml_text(tree, self.provenance if comments else None)

    def source(self, key: str) -> str:
        """Where a key was written; ``default`` when it was not."""
        return self.provenance.get(key, "default")


def load_run_config(
    preset: str | None,
    sets: Sequence[str] = (),
    *,
    strategy_configs: Callable[[str], type],
    presets: Iterable[PresetSpec] = (),
    output_dir: str | None = None,
) -> LoadedConfig:
    """Read, override, structure and check a run's configuration.

    Args:
        strategy_configs: the config class of a strategy; the plugin floor answers.
        output_dir: wins over the preset's and ``--set``'s.

    Raises:
        ConfigError: all problems at once, each with key and source.
        PluginError: the strategy is not there.
    """
    found = find_preset(preset, presets) if preset is not None else None
    document = read_document(found.path) if found else Document(path=Path("--set"), tree={}, lines={})
    tree = document.tree
    overridden, problems = apply_overrides(tree, sets)
    if output_dir is not None:
        tree["output_dir"] = output_dir
        overridden.add("output_dir")

    def source(key: str) -> str:
        if any(key == name or key.startswith(name + ".") for name in overridden):
            return SOURCE if key != "output_dir" or output_dir is None else "--output-dir"
        if key not in document.lines and any(name.startswith(key + ".") for name in overridden):
            return SOURCE  # a table that only an override made
        return document.source(key)

    run, more = _structure(tree, strategy_configs, source)
    if run is not None and run.output_dir is not None and not run.output_dir.strip():
        empty = "the name of a folder is wanted, not an empty text"  # it would mean the folder that we are in
        more.append(Problem(message=empty, key="output_dir", hint="leave it out for runs/<preset name>"))
    problems += [attrs.evolve(problem, source=source(problem.key or "")) for problem in more]
    if run is None or problems:
        raise ConfigError.of(problems)
    default = f"runs/{found.name if found else 'run'}"
    run = attrs.evolve(run, output_dir=str(expanded(run.output_dir)) if run.output_dir is not None else default)
    return LoadedConfig(
        run=run,
        provenance=_provenance(run, tree, source),
        preset_name=found.name if found else "run",
        preset_path=found.path if found else None,
        notes=(found.note,) if found and found.note else (),
    )


def _structure(
    tree: dict[str, Any], strategy_configs: Callable[[str], type], source: Callable[[str], str]
) -> tuple[RunConfig | None, list[Problem]]:
    injection = tree.get("injection", {})
    strategy = injection.get("strategy", DEFAULT_STRATEGY) if isinstance(injection, dict) else DEFAULT_STRATEGY
    if not isinstance(strategy, str):
        wanted = Problem(
            message="the name of a strategy is wanted", key="injection.strategy", hint=f'such as "{DEFAULT_STRATEGY}"'
        )
        return None, [wanted]
    try:
        config_class = strategy_configs(strategy)
    except PluginError as error:
        first = error.problems[0]
        raise PluginError(
            first.message, hint=first.hint, key="injection.strategy", source=source("injection.strategy")
        ) from error
    rest = {name: value for name, value in tree.items() if name != "injection"}
    known = [key for key in leaf_keys(RunConfig) if not key.startswith(("injection.", "strategy"))]
    known += [*leaf_keys(config_class, "injection."), "injection.strategy"]
    structurer = Structurer(known, sections={"injection", *(key.partition(".")[0] for key in known)})
    if isinstance(injection, dict):
        structured = structurer.structure(
            config_class, {name: value for name, value in injection.items() if name != "strategy"}, "injection."
        )
    else:
        structured = structurer.structure(InjectionConfig, injection, "injection.")
    run = structurer.structure(_core_class(), rest)
    if run is None or structured is None or structurer.problems:
        return None, structurer.problems
    fields = {attribute.name: getattr(run, attribute.name) for attribute in attrs.fields(type(run))}
    return RunConfig(strategy=strategy, injection=structured, **fields), []


def _core_class() -> type:
    """``RunConfig`` without the two fields that the ``injection`` table fills."""
    fields = {
        attribute.name: attrs.field(default=attribute.default, metadata=attribute.metadata, type=attribute.type)
        for attribute in attrs.fields(attrs.resolve_types(RunConfig))
        if attribute.name not in ("strategy", "injection")
    }
    return attrs.make_class("RunConfig", fields, class_body={"check": RunConfig.check}, frozen=True, kw_only=True)


def _provenance(run: RunConfig, tree: Mapping[str, Any], source: Callable[[str], str]) -> dict[str, str]:
    keys = [key for key in leaf_keys(RunConfig) if not key.startswith("injection.") and key != "strategy"]
    keys += ["injection.strategy", *leaf_keys(type(run.injection), "injection.")]
    provenance = {}
    for key in keys:
        node: Any = tree
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        provenance[key] = "default" if node is None else source(key)
    return provenance
