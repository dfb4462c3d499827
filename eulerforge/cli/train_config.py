"""What ``train`` and ``data preview`` do before torch: options, loading, and every check that needs no model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

import attrs

from eulerforge.cli.output import say, warn
from eulerforge.cli.plugin_options import DEBUG_HELP, add_plugin_options
from eulerforge.config import LoadedConfig, load_run_config
from eulerforge.config.location import expanded, is_package_location, resolve_location
from eulerforge.config.phase_checks import best_problems, phase_problems
from eulerforge.errors import ConfigError, PluginError, Problem, UsageError
from eulerforge.models.source import NO_MODEL, can_only_be_here

if TYPE_CHECKING:
    from eulerforge.plugins import Registry


def add_config_options(parser: argparse.ArgumentParser, *, debug_help: str = DEBUG_HELP) -> None:
    """``--preset``, ``--set``, ``--output-dir`` and the options that every command has."""
    parser.add_argument("--preset", metavar="P", help="a TOML or YAML file, or the name of a bundled preset")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="sets",
        metavar="KEY=VALUE",
        help="change one key, such as training.lr=2e-5; may be given often",
    )
    parser.add_argument("--output-dir", metavar="DIR", help="folder of the run")
    add_plugin_options(parser, debug_help=debug_help)


def load_from_args(args: argparse.Namespace, registry: Registry) -> LoadedConfig:
    """The configuration that the options describe; its notes go to stderr.

    Raises:
        UsageError: neither a preset nor an override is given.
        ConfigError: all problems of the preset at once.
    """
    if args.preset is None and not args.sets:
        raise UsageError("no preset is given", hint="--preset NAME; eulerforge presets list shows the bundled ones")
    loaded = load_run_config(
        args.preset,
        args.sets,
        strategy_configs=registry.strategy_config,
        presets=registry.presets(),
        output_dir=args.output_dir,
    )
    for note in loaded.notes:
        say(f"note: {note}")
    return loaded


def validate(loaded: LoadedConfig, registry: Registry) -> None:
    """Check what needs no model: the backbone's name, phase groups, data files. Warnings go to stderr.

    Raises:
        ConfigError: all problems at once.
        PluginError: the backbone is not installed.
    """
    run = loaded.run
    if run.backbone != "auto":
        try:
            registry.backbone(run.backbone)
        except PluginError as error:
            raise PluginError.of([_sourced(problem, loaded) for problem in error.problems]) from error
    offered = {group for spec in registry.phase_groups() for group in spec.groups}
    own = registry.strategy(run.strategy).groups
    errors, warnings = phase_problems(run.training, strategy=run.strategy, own=own, offered=offered)
    errors += [*best_problems(run), *_missing_model(run.model_name), *_missing_files(loaded)]
    for problem in warnings:
        warn(_sourced(problem, loaded))
    if errors:
        raise ConfigError.of([_sourced(problem, loaded) for problem in errors])


def _sourced(problem: Problem, loaded: LoadedConfig) -> Problem:
    key = problem.key or ""
    while key and key not in loaded.provenance:
        key = key.rpartition(".")[0]
    source = loaded.source(key)
    return problem if source == "default" else attrs.evolve(problem, source=source)


def _missing_model(name: str) -> Iterator[Problem]:
    """A model that can only be here, and is not; what else is written may be a name on the hub."""
    if can_only_be_here(name) and not is_package_location(name) and not expanded(name).exists():
        yield Problem(
            key="model_name",
            message=f"there is no {'file' if name.endswith('.gguf') else 'model folder'} {name}",
            hint=NO_MODEL,
        )


def _missing_files(loaded: LoadedConfig) -> Iterator[Problem]:
    from eulerforge.data.files import what_is_wrong  # takes as long to import as all the rest of this check

    data = loaded.run.data
    for key, texts in (("data.path", data.path), ("data.validation.path", data.validation.path)):
        for text in texts:
            try:
                path = resolve_location(text)
            except UsageError as error:
                yield attrs.evolve(error.problems[0], key=key)
                continue
            if path.is_dir():
                yield Problem(
                    key=key, message=f"{text} is a folder", hint=f"name the files in it: --set '{key}=[\"a.jsonl\"]'"
                )
            elif not path.is_file():
                yield Problem(key=key, message=f"there is no file {text}", hint="give a JSON Lines file")
            elif wrong := what_is_wrong(text, path):
                yield Problem(key=key, message=wrong[0], hint=wrong[1])
