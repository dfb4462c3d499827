"""``eulerforge env``: versions and folders, for a bug report; nothing heavy is imported to know them."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

from eulerforge.cli.output import emit_json, print_table
from eulerforge.cli.plugin_options import add_plugin_options, registry_from

PACKAGES = (
    "eulerforge-core", "torch", "transformers", "tokenizers", "safetensors", "pluggy", "attrs", "cattrs", "tomli",
    "PyYAML", "rich", "bitsandbytes", "gguf", "numpy",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output on stdout")
    add_plugin_options(parser)


def run(args: argparse.Namespace) -> int:
    from eulerforge.config.cachedir import cache_root
    from eulerforge.config.presets import bundled_folder

    registry = registry_from(args)
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "plugins": ", ".join(f"{record.name} {record.version} ({record.status})" for record in registry.records),
        "cache": str(cache_root()),
        "presets": str(bundled_folder()),
    }
    if args.json:
        emit_json(facts)
    else:
        print_table(("WHAT", "VALUE"), list(facts.items()))
    return 0


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
