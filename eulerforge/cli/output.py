"""How the command line speaks: data on stdout, everything else on stderr, JSON in one envelope."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from eulerforge.errors import Problem
from eulerforge.terminal import harmless, harmless_json, one_line, strict

SCHEMA = 1


def emit_json(data: Any) -> None:
    """Success, for a machine: ``{"schema": 1, "ok": true, "data": ...}`` on stdout; null for what is not finite."""
    body = {"schema": SCHEMA, "ok": True, "data": strict(data)}
    print(harmless_json(json.dumps(body, ensure_ascii=False, default=str, allow_nan=False)))


def emit_json_problems(problems: Sequence[Problem]) -> None:
    """Failure, for a machine, in the same envelope."""
    body = {"schema": SCHEMA, "ok": False, "problems": [problem.to_json() for problem in problems]}
    print(harmless_json(json.dumps(body, ensure_ascii=False)))


def say(text: str) -> None:
    """A line for the person who watches, on stderr, without control characters."""
    print(harmless(text), file=sys.stderr, flush=True)


def tell(text: str, *, end: str = "\n") -> None:
    """Data for a person, on stdout, without control characters."""
    print(harmless(text), end=end)


def warn(text: str | Problem) -> None:
    """A ``warning:`` line, with its hint when it has one."""
    problem = text if isinstance(text, Problem) else Problem(message=text)
    for line in problem.lines("warning"):
        say(line)


def colour_wanted() -> bool:
    """Whether stdout is a terminal that may be coloured (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: drawn by rich on a terminal, plain aligned columns elsewhere."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    if colour_wanted():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*headers, box=box.SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]
    for row in (headers, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
