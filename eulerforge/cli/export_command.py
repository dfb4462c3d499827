"""``eulerforge export RUN --format merged|peft``: what a run learnt, in a form that other tools read.

``eulerforge merge`` is the short form for the merged Hugging Face folder and runs through the same function.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eulerforge.models.source import BaseSource

FORMATS = ("merged", "peft")
DTYPES = ("auto", "fp32", "fp16", "bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``export``."""
    from eulerforge.config.location import expanded

    parser.description = "Write what a run learnt as a merged Hugging Face folder or as a PEFT adapter."
    parser.add_argument("--format", required=True, choices=FORMATS, help="merged: a plain model; peft: the adapters")
    parser.add_argument(
        "--keys",
        choices=("text", "multimodal"),
        default="text",
        help="peft: names for the text model, or for the multimodal one of the same checkpoint, which vLLM serves",
    )
    parser.add_argument("--output", required=True, type=expanded, metavar="DIR", help="folder to write")
    add_shared_arguments(parser)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``export`` and ``merge`` share."""
    from eulerforge.cli.plugin_options import add_plugin_options
    from eulerforge.config.location import expanded

    parser.add_argument("run", type=expanded, metavar="RUN", help="a run's folder, or a checkpoint in it")
    parser.add_argument("--checkpoint", type=int, metavar="N", help="the step to take (default: final)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the merged weights (default: the base files' own)"
    )
    parser.add_argument("--device", default="cpu", help="where the base is loaded (default: cpu)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--no-verify", action="store_true", help="do not reopen the merged folder with transformers")
    parser.add_argument("--force", action="store_true", help="write what the audit of the adapters or logits forbids")
    parser.add_argument("--layers", action="store_true", help="print the size of every layer's update")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    add_plugin_options(parser)


def run(args: argparse.Namespace) -> int:
    """Write the export and say where it is."""
    return write(args, format=args.format, output=args.output, keys=args.keys)


def write(args: argparse.Namespace, *, format: str, output: Path | None, keys: str = "text") -> int:
    """Open the run and write it, by default to ``merged`` in the run's folder; both commands end here.

    Raises:
        UsageError: the options don't fit the format, or the output cannot be written to.
        EulerForgeError: the run cannot be opened.
        RunError: the audit forbids to publish it.
    """
    import attrs

    from eulerforge.cli.output import emit_json, print_table, say, tell, warn
    from eulerforge.cli.plugin_options import registry_from
    from eulerforge.errors import UsageError

    if format == "peft" and args.dtype != "auto":
        raise UsageError("--dtype is for --format merged; a PEFT adapter is fp32", hint="leave --dtype out")
    if format == "merged" and keys != "text":
        raise UsageError(
            "--keys is for --format peft; a merged model has its base's own names", hint="leave --keys out"
        )
    registry = registry_from(args)

    from eulerforge.export.destination import prepare, refuse_existing
    from eulerforge.export.merged import merged_bytes, write_merged
    from eulerforge.export.peft_adapter import peft_bytes, write_peft
    from eulerforge.export.rundir import attach, locate, open_base
    from eulerforge.training.checkpoint import ADAPTER_FILE

    dtype = None if args.dtype == "auto" else args.dtype
    location = locate(args.run, args.checkpoint, say=say)
    out = output or location.folder / "merged"

    def found(source: BaseSource) -> None:
        """Look at the place before minutes are spent on loading."""
        # what trained has the precision of a PEFT adapter on the disk
        learnt = (location.checkpoint / ADAPTER_FILE).stat().st_size
        base = source.folder
        prepare(out, peft_bytes(learnt, base) if format == "peft" else merged_bytes(base, dtype), say)

    refuse_existing(out, overwrite=args.overwrite)
    opened = attach(open_base(location, registry=registry, device=args.device, found=found, say=say), registry)
    for line in (*opened.location.notes, *opened.warnings):
        warn(line)
    if format == "peft":
        written = write_peft(opened, out, keys=keys, overwrite=args.overwrite, force=args.force)
    else:
        written = write_merged(
            opened, out, dtype=dtype, overwrite=args.overwrite, verify=not args.no_verify, force=args.force
        )
    for problem in written.audit.problems:
        warn(attrs.evolve(problem, message=f"written because of --force: {problem.message}", hint=None))
    for problem in (*written.audit.warnings, *written.warnings):
        warn(problem)
    if args.json:
        emit_json(written.to_json())
    else:
        what = "adapter tensors" if format == "peft" else "of the base's tensors replaced"
        size = f"{written.size / 2**20:,.1f} MiB"
        tell(f"{written.folder}: {opened.checkpoint.name}, {len(written.tensors):,} {what}, {size}")
        tell("\n".join(written.audit.lines()))
        if args.layers:
            print_table(*written.audit.table())
    return 0
