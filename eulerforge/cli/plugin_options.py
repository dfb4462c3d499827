"""The options by which every command blocks plugins, and the registry that they give."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from eulerforge.cli.output import warn

if TYPE_CHECKING:
    from eulerforge.plugins import Registry


def add_plugin_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-plugin", action="append", default=[], metavar="NAME", help="leave a plugin out, before it is imported"
    )
    parser.add_argument("--strict-plugins", action="store_true", help="stop when any plugin is broken or in conflict")


def registry_from(args: argparse.Namespace) -> Registry:
    """The registry without what ``--no-plugin`` names; its warnings go to stderr."""
    from eulerforge.plugins import load_registry

    registry = load_registry(disable=args.no_plugin, strict=args.strict_plugins)
    for warning in registry.warnings:
        warn(warning)
    return registry
