"""Every place in our sources where an error comes into being, read from the syntax trees: the walk's list of stops.

A site is a ``raise`` statement, or a call that makes an EulerForgeError, one of its kin, or a Problem.
Its key holds the file, the function, the class and the first words of the message: no line number, so that a list of
keys in a committed file outlives the edits around it.
"""

from __future__ import annotations

import ast
import builtins
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import attrs

ROOT = Path(__file__).parent.parent
SOURCES = (ROOT / "eulerforge", *sorted(ROOT.glob("plugins/*/src")))
KIT = ROOT / "eulerforge" / "testing"
"""The kit for plugin authors: its failures are failed tests, never lines of a command."""
CARRIERS = frozenset({"BadRow", "WrongTypeError", "PluginFailure", "Incompatible"})
"""What carries message and hint to a place that makes a Problem of them."""
BUILTIN = {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)}
BUILTIN |= {"ArgumentTypeError"}
WORDS = 48


@attrs.frozen(kw_only=True)
class Site:
    """``start`` and ``end`` are lines, for matching a frame; ``call`` is what makes the error, if it is made here."""

    path: Path
    function: str
    kind: str
    words: str
    start: int
    end: int
    raised: bool
    call: ast.Call | None

    @property
    def file(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def key(self) -> str:
        return f"{self.file}::{self.function}::{self.kind}::{self.words}"

    @property
    def builtin(self) -> bool:
        """Python's own errors, and argparse's: nothing of ours makes them."""
        return self.kind in BUILTIN

    def __str__(self) -> str:
        return f"{self.file}:{self.start} {self.kind} {self.words}"


@cache
def trees() -> dict[Path, ast.Module]:
    """The syntax tree of each module that a command can reach."""
    paths = (path for source in SOURCES for path in sorted(source.rglob("*.py")))
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths if not path.is_relative_to(KIT)}


def name_of(node: ast.expr | None) -> str:
    """The last name of ``a.b.C``."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


@cache
def error_classes() -> frozenset[str]:
    """EulerForgeError and every class below it, by name."""
    below = [node for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    known = {"EulerForgeError"}
    while more := {one.name for one in below if known & {name_of(base) for base in one.bases}} - known:
        known |= more
    return frozenset(known)


@cache
def sites() -> tuple[Site, ...]:
    """All sites, in the order of files and lines."""
    found = [site for path, tree in trees().items() for site in _in_body(path, tree, ())]
    seen: Counter[str] = Counter()
    numbered = []
    for site in sorted(found, key=lambda site: (site.path, site.start, site.end)):
        seen[site.key] += 1
        again = f" #{seen[site.key]}" if seen[site.key] > 1 else ""
        numbered.append(attrs.evolve(site, words=site.words + again))
    return tuple(numbered)


def _in_body(path: Path, node: ast.AST, names: tuple[str, ...]) -> Iterator[Site]:
    for child in ast.iter_child_nodes(node):
        inner = names
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inner = (*names, child.name)
        site = _site(path, child, ".".join(inner) or "-")
        if site is None:
            yield from _in_body(path, child, inner)
            continue
        yield site
        if site.raised and site.call is not None:
            yield from _in_body(path, site.call, inner)


def _site(path: Path, node: ast.AST, function: str) -> Site | None:
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        made, span, raised = node.exc, node, True
    elif isinstance(node, ast.Call) and _made(node) in error_classes() | {"Problem"}:
        made, span, raised = node, node, False
    else:
        return None
    return Site(
        path=path,
        function=function,
        kind=_made(made),
        words=" ".join(first_words(made).split())[:WORDS],
        start=span.lineno,
        end=span.end_lineno or span.lineno,
        raised=raised,
        call=made,
    )


def _made(call: ast.Call) -> str:
    """The class of the error, ``of`` left out; or the name of the function that makes it."""
    if isinstance(call.func, ast.Attribute) and call.func.attr == "of":
        return name_of(call.func.value)
    return name_of(call.func)


def argument(call: ast.Call, name: str, place: int | None = None) -> ast.expr | None:
    """The argument ``name`` of a call, by keyword or by place."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    return call.args[place] if place is not None and place < len(call.args) else None


def first_words(call: ast.Call) -> str:
    """The first text among the arguments as the source has it, holes as ``{}``; without one, the first argument."""
    arguments = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "message")]
    for part in (part for one in arguments for part in ast.walk(one)):
        if isinstance(part, ast.JoinedStr):
            return "".join(str(one.value) if isinstance(one, ast.Constant) else "{}" for one in part.values)
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and " " in part.value:
            return part.value
    return ast.unparse(arguments[0]) if arguments else ""


def texts(node: ast.AST) -> Iterator[str]:
    """Every literal text below ``node``."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value
