"""``eulerforge presets list | show``: what can be put behind ``--preset``."""

from __future__ import annotations

import argparse

import attrs

from eulerforge.cli.output import emit_json, print_table, tell, warn
from eulerforge.cli.plugin_options import add_plugin_options, registry_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="presets_command", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="all bundled presets and those of plugins")
    show = commands.add_parser("show", help="the text of one preset")
    show.add_argument("name", metavar="NAME", help="a name that the list shows, or a path")
    for one in (listing, show):
        one.add_argument("--json", action="store_true", help="machine-readable output on stdout")
        add_plugin_options(one)


def run(args: argparse.Namespace) -> int:
    from eulerforge.config import find_preset, list_presets

    registry = registry_from(args)
    if args.presets_command == "list":
        found = list_presets(registry.presets())
        for preset in found:
            if preset.problem is not None:
                warn(attrs.evolve(preset.problem, key=f"preset {preset.name} of {preset.origin}"))
        rows = [(preset.name, preset.path.name, preset.origin) for preset in found if preset.problem is None]
        if args.json:
            emit_json({"presets": [dict(zip(("name", "file", "origin"), row, strict=True)) for row in rows]})
        else:
            print_table(("NAME", "FILE", "FROM"), rows)
        return 0
    preset = find_preset(args.name, registry.presets())
    text = preset.path.read_text(encoding="utf-8")
    if args.json:
        emit_json({"name": preset.name, "path": str(preset.path), "text": text})
    else:
        tell(text, end="")
    return 0
