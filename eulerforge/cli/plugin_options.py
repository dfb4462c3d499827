"""The options that every command has: which plugins to leave out, and tracebacks; and the registry that they give."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from eulerforge.cli.output import warn

if TYPE_CHECKING:
    from eulerforge.plugins import Registry


DEBUG_HELP = "show the traceback of an error"


def add_plugin_options(parser: argparse.ArgumentParser, *, debug_help: str = DEBUG_HELP) -> None:
    parser.add_argument(
        "--no-plugin", action="append", default=[], metavar="NAME", help="leave a plugin out, before it is imported"
    )
    parser.add_argument("--strict-plugins", action="store_true", help="stop when any plugin is broken or in conflict")
    parser.add_argument("--debug", action="store_true", help=debug_help)


def registry_from(args: argparse.Namespace) -> Registry:
    """The registry without what ``--no-plugin`` names; its warnings go to stderr."""
    from eulerforge.plugins import load_registry

    registry = load_registry(disable=args.no_plugin, strict=args.strict_plugins)
    for warning in registry.warnings:
        warn(warning)
    return registry
