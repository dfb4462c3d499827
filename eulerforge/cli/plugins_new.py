"""``eulerforge plugins new``: a distribution whose tests pass at once, to be changed until it is yours.

Notable: nothing heavy is imported; which model types transformers knows is read from its files.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from string import Template

import attrs

from eulerforge import __version__
from eulerforge.api import API_VERSION
from eulerforge.cli.output import emit_json, tell, warn
from eulerforge.config.atomic import staged_folder
from eulerforge.config.location import expanded
from eulerforge.config.suggest import nearest
from eulerforge.errors import UsageError
from eulerforge.plugins import Registry

TEMPLATES = Path(__file__).parent / "templates"
NAME = re.compile(r"[a-z]([a-z0-9._-]*[a-z0-9])?")
LONGEST = 60
DEFAULT_MODEL_TYPE = "llama"


@attrs.frozen
class Kind:
    """What can be made: the prefix of its distributions, the kind of its offer, its summary, and its modules."""

    prefix: str
    offer: str
    summary: str
    modules: tuple[str, ...]


KINDS: Mapping[str, Kind] = {
    "backbone": Kind("eulerforge-backbone-", "backbone", "Models of model_type $model_type", ("plugin", "adapter")),
    "strategy": Kind(
        "eulerforge-strategy-", "strategy", "One trained factor per output", ("plugin", "config", "strategy")
    ),
    "phases": Kind("eulerforge-phases-", "phase_group", "The norms of the chosen layers", ("plugin", "resolver")),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of the plugin: lower-case letters, digits, '.', '_' or '-'")
    parser.add_argument("--kind", required=True, metavar="KIND", help=f"what it offers: {', '.join(KINDS)}")
    parser.add_argument(
        "--model-type",
        metavar="TYPE",
        help=f"of a backbone: config.model_type of its family (default: {DEFAULT_MODEL_TYPE})",
    )
    parser.add_argument("--output", default=".", metavar="DIR", help="folder in which to put it (default: this one)")


def run(args: argparse.Namespace, registry: Registry) -> int:
    """Write the distribution and say what comes next.

    Raises:
        UsageError: a name is wrong or taken, or the folder exists.
    """
    kind = _kind(args.kind)
    values = _values(kind, _checked_name(args.name, kind, registry), _model_type(args, kind))
    folder = expanded(args.output) / values["distribution"]
    texts = render(args.kind, values)
    _write(folder, texts)
    if kind.offer == "backbone":
        for other in registry.backbones_for(values["model_type"]):
            warn(
                f"backbone {other.name} covers model_type {values['model_type']!r} too: a preset must name one, "
                "because backbone = auto stops at two"
            )
    following = [f"cd {shlex.quote(str(folder))}", "pip install -e '.[test]'", "python -m pytest"]
    if args.json:
        shown = {name: values[name] for name in ("name", "distribution", "package")}
        emit_json({**shown, "kind": args.kind, "folder": str(folder), "files": sorted(texts), "next": following})
    else:
        tell(f"wrote {folder} ({len(texts)} files); next:")
        for line in following:
            tell(f"  {line}")
    return 0


def render(kind: str, values: Mapping[str, str]) -> dict[str, str]:
    """Text by path in the distribution.

    Raises:
        KeyError: a template names a value that is not there.
    """
    package = f"src/{values['package']}"
    places = {
        "pyproject.toml": "common/pyproject.toml",
        "README.md": f"{kind}/README.md",
        f"{package}/__init__.py": "common/__init__.py",
        f"{package}/py.typed": "common/py.typed",
        "tests/test_conformance.py": f"{kind}/test_conformance.py",
    }
    places |= {f"{package}/{module}.py": f"{kind}/{module}.py" for module in KINDS[kind].modules}
    return {
        path: Template((TEMPLATES / f"{source}.in").read_text(encoding="utf-8")).substitute(values)
        for path, source in places.items()
    }


def transformers_model_types() -> set[str]:
    """Every ``model_type`` that the installed transformers declares; empty when its files are not found."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return set()
    declared = re.compile(r"^    model_type(?:: str)? = [\"']([\w.-]+)[\"']", re.MULTILINE)
    files = Path(spec.origin).parent.glob("models/*/configuration_*.py")
    return {name for path in files for name in declared.findall(path.read_text(encoding="utf-8"))}


def _kind(word: str) -> Kind:
    if word not in KINDS:
        near = nearest(word, KINDS)
        raise UsageError(
            f"there is no kind {word!r}",
            hint=f"did you mean --kind {near}?" if near else f"--kind {' | '.join(KINDS)}",
        )
    return KINDS[word]


def _checked_name(name: str, kind: Kind, registry: Registry) -> str:
    if not NAME.fullmatch(name) or ".." in name or len(name) > LONGEST:
        raise UsageError(
            f"{name!r} is no name for a plugin",
            hint="lower-case letters, digits, '.', '_' or '-'; it begins with a letter and ends with one or a digit, "
            f"and has {LONGEST} characters at most",
        )
    claims = registry.index.find(kind.offer, name)
    claims = claims or (registry.index.find("group", _identifier(name)) if kind.offer == "phase_group" else [])
    if claims:
        raise UsageError(
            f"the name {name!r} is taken by {claims[0][0].qualified_name}",
            hint="of two plugins with one name neither wins: choose another",
        )
    return name


def _model_type(args: argparse.Namespace, kind: Kind) -> str:
    if kind.offer != "backbone":
        if args.model_type is not None:
            raise UsageError("--model-type belongs to --kind backbone", hint="leave it out")
        return ""
    word: str = args.model_type or DEFAULT_MODEL_TYPE
    known = transformers_model_types()
    if known and word not in known:
        near = nearest(word, known)
        raise UsageError(
            f"the installed transformers has no model_type {word!r}",
            hint=f"did you mean --model-type {near}?"
            if near
            else "begin with the nearest family; a test class can make models of its own",
        )
    return word


def _values(kind: Kind, name: str, model_type: str) -> dict[str, str]:
    distribution = re.sub(r"[-_.]+", "-", kind.prefix + name)
    major, minor, *_ = __version__.split(".")
    return {
        "name": name,
        "distribution": distribution,
        "package": distribution.replace("-", "_"),
        "camel": "".join(part.capitalize() for part in re.split(r"[-_.]+", name)),
        "group": _identifier(name),
        "model_type": model_type,
        "summary": Template(kind.summary).substitute(model_type=model_type),
        "api": API_VERSION,
        "core_range": f">={major}.{minor},<{major}.{int(minor) + 1}",
    }


def _identifier(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name)


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    if os.path.lexists(folder):
        raise UsageError(f"{folder} exists already, and nothing is overwritten", hint="another NAME or --output DIR")
    if folder.parent.exists() and not folder.parent.is_dir():
        raise UsageError(f"{folder.parent} is no folder", hint="--output DIR names a folder of yours")
    try:
        with staged_folder(folder) as staging:
            for path, text in texts.items():
                file = staging / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
    except FileExistsError as error:
        raise UsageError(f"{error}; nothing is overwritten", hint="another NAME or --output DIR") from error
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error}", hint="--output DIR names a folder of yours") from error
