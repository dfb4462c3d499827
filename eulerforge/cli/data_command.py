"""``eulerforge data preview``: the rows as the model will see them, trained tokens told apart from masked ones.

On a terminal trained text is green and masked text dim; elsewhere, and with NO_COLOR, trained text stands in ⟦ ⟧.
"""

from __future__ import annotations

import argparse
import sys
from typing import TextIO

from eulerforge.cli.numbers import at_least

TRAINED_START, TRAINED_END = "\x1b[32m", "\x1b[0m"
MASKED_START, MASKED_END = "\x1b[2m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``data``."""
    from eulerforge.cli.train_config import add_config_options

    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    preview = actions.add_parser("preview", help="show rows with trained and masked tokens told apart")
    add_config_options(preview)
    preview.add_argument("--rows", type=at_least(1), default=3, metavar="N", help="how many rows to show (default 3)")
    preview.add_argument("--validation", action="store_true", help="show held-out rows instead of training rows")
    preview.add_argument("--json", action="store_true", help="print JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Print the preview. Raises DataError for bad rows and ConfigError for a bad preset."""
    import attrs

    from eulerforge.cli.output import colour_wanted, emit_json, tell, warn
    from eulerforge.cli.plugin_options import registry_from
    from eulerforge.cli.train_config import load_from_args
    from eulerforge.data.parity import check_parity
    from eulerforge.data.prepared import build_dataset
    from eulerforge.data.preview import preview_rows
    from eulerforge.errors import DataError
    from eulerforge.models.load import load_tokenizer

    config = load_from_args(args, registry_from(args)).run
    tokenizer = load_tokenizer(config)
    datasets = build_dataset(config.data, tokenizer, seed=config.seed)
    rows = datasets.validation if args.validation else datasets.train
    if rows is None:
        raise DataError("nothing is held out", key="data.validation", hint="--set data.validation.fraction=0.1")
    try:
        check_parity(datasets, config.data, tokenizer)
    except DataError as error:
        for problem in error.problems:
            warn(attrs.evolve(problem, message=f"train refuses these rows: {problem.message}"))
    previews = preview_rows(rows, tokenizer, args.rows)
    if args.json:
        emit_json({"report": datasets.report.to_json(), "rows": [preview.to_json() for preview in previews]})
        return 0
    colour = colour_wanted()
    for preview in previews:
        tell(f"--- {preview.source}: {preview.tokens:,} tokens, {preview.trained_tokens:,} trained")
        if colour:
            print(preview.marked(TRAINED_START, TRAINED_END, MASKED_START, MASKED_END))
        else:
            print(preview.marked(*_brackets(sys.stdout)))
    print("---")
    print("trained text is green, masked text is dim" if colour else "trained text stands in double brackets")
    for line in datasets.report.lines():
        tell(line)
    return 0


def _brackets(stream: TextIO) -> tuple[str, str]:
    """⟦ and ⟧, or [[ and ]] where the stream's encoding has no such characters."""
    try:
        "⟦⟧".encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "[[", "]]"
    return "⟦", "⟧"
