"""``eulerforge merge RUN``: the short form of ``export RUN --format merged``."""

from __future__ import annotations

import argparse

from eulerforge.cli import export_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``merge``."""
    from eulerforge.config.location import expanded

    parser.description = "Merge a run's adapters into its base and write a plain Hugging Face folder."
    parser.add_argument(
        "--output", type=expanded, metavar="DIR", help="folder to write (default: merged, in the run's folder)"
    )
    export_command.add_shared_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write the merged folder and say where it is."""
    return export_command.write(args, format="merged", output=args.output)
