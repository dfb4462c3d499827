"""``eulerforge replay RUN``: train some steps again and say whether the numbers are the same."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``replay``."""
    from eulerforge.cli.plugin_options import add_plugin_options
    from eulerforge.config.location import expanded

    parser.description = (
        "Train some steps of a run again, in memory, and compare losses and tensors with what the run recorded."
        " Exit code 1 and the first difference when they are not the same to the bit."
    )
    parser.add_argument("run", type=expanded, metavar="RUN", help="a run's folder")
    parser.add_argument("--steps", type=_count, required=True, metavar="N", help="how many steps")
    parser.add_argument(
        "--from",
        type=int,
        dest="start",
        metavar="STEP",
        help="the checkpoint to start from, 0 for the beginning (default: the newest with N recorded steps after it)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    add_plugin_options(parser)


def run(args: argparse.Namespace) -> int:
    """Replay and print.

    Raises:
        EulerForgeError: the first difference, or why there was no replay.
    """
    from eulerforge.cli.output import emit_json, say, tell
    from eulerforge.cli.plugin_options import registry_from
    from eulerforge.training.kernelcache import bound_kernel_caches

    bound_kernel_caches()
    from eulerforge.training.replay import replay

    report = replay(args.run, registry_from(args), steps=args.steps, start=args.start, say=say)
    if args.json:
        emit_json(report.to_json())
        return 0
    against = f" and {report.tensors:,} tensors of {', '.join(report.folders)}" if report.folders else ""
    tell(f"steps {report.start + 1} to {report.end} match to the bit: {report.numbers:,} numbers{against}")
    return 0


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of steps")
    return value
