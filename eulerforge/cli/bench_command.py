"""``eulerforge bench RUN``: held-out loss, perplexity, speed and samples of the base and of the merged model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from eulerforge.cli.numbers import at_least

if TYPE_CHECKING:
    from eulerforge.evaluation.bench import BenchReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``bench``."""
    from eulerforge.cli.plugin_options import add_plugin_options
    from eulerforge.config.location import expanded

    parser.description = (
        "Merge a run's adapters in memory and measure the plain model on held-out rows, beside its base."
    )
    parser.add_argument("run", type=expanded, metavar="RUN", help="a run's folder, or a checkpoint in it")
    parser.add_argument("--checkpoint", type=int, metavar="N", help="the step to take (default: final)")
    parser.add_argument("--live", action="store_true", help="leave the adapters on instead of merging them")
    parser.add_argument(
        "--data", action="append", default=[], metavar="FILE", help="rows to measure instead of the held-out ones"
    )
    parser.add_argument(
        "--samples", type=at_least(0), metavar="N", help="held-out prompts to answer (default: the preset's)"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a prompt to answer; may be repeated"
    )
    parser.add_argument("--max-new-tokens", type=at_least(1), metavar="N", help="answer length (default: the preset's)")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: the preset's)")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    add_plugin_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Raises:
        EulerForgeError: the run cannot be opened, or holds no rows out.
    """
    from eulerforge.cli.output import emit_json, say, tell
    from eulerforge.cli.plugin_options import registry_from
    from eulerforge.training.kernelcache import bound_kernel_caches

    registry = registry_from(args)
    bound_kernel_caches()

    from eulerforge.evaluation.bench import BenchRequest, run_bench

    request = BenchRequest(
        path=args.run,
        checkpoint=args.checkpoint,
        live=args.live,
        samples=args.samples,
        prompts=tuple(args.prompt),
        data=tuple(args.data),
        max_new_tokens=args.max_new_tokens,
        device=args.device,
    )
    report = run_bench(request, registry=registry, say=say)
    if args.json:
        emit_json(report.to_json())
    else:
        tell("\n".join(lines(report)))
    return 0


def lines(report: BenchReport) -> list[str]:
    """The report as a person reads it."""
    text = [
        f"{report.run} ({report.checkpoint}, step {report.step}, {report.mode}, {report.dtype} on {report.device})",
        f"{report.rows:,} held-out rows, {report.label_tokens:,} trained tokens",
        f"{'':<8}{'loss':>10}{'perplexity':>14}{'tokens/s':>12}",
    ]
    for name, scores in (("base", report.base), ("tuned", report.tuned)):
        text.append(f"{name:<8}{scores.loss:>10.4f}{scores.perplexity:>14.3f}{scores.tokens_per_second:>12,.0f}")
    change = "lower" if report.gain >= 0 else "HIGHER"
    text.append(f"the held-out loss is {abs(report.gain):.1%} {change} than the base's")
    for sample in report.samples:
        text += ["", *sample.lines()]
    return text
