"""The floors of the architecture, held by reading every import: a module may use what lies below it, and nothing above.

An import inside a function counts as well: a lazy import is still a dependency. One under ``TYPE_CHECKING`` does not,
because it vanishes at run time; and what must stay light is looked at on module level alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "eulerforge"
PLUGINS = ROOT / "plugins"

F0 = {"terminal", "errors", "api"}
F1 = F0 | {"config"}
F2 = F1 | {"plugins"}
F3 = F2 | {"models", "data", "lora"}
F4 = F3 | {"training", "export", "evaluation"}
ALLOWED: dict[str, set[str]] = {
    "terminal": set(),
    "errors": {"terminal"},
    "api": {"errors", "terminal"},
    "config": F0,
    "plugins": F1,
    "models": F2,
    "data": F2,
    "lora": F2 | {"models"},
    "training": F3,
    "export": F3 | {"training"},
    "evaluation": F3 | {"training", "export"},
    "cli": F4,
    "testing": F4,
    "__main__": {"cli"},
}
PLUGINS_MAY_USE = {"api", "errors", "lora", "models"}
LIGHT = ("terminal", "errors", "api", "config", "plugins", "cli")
HEAVY = {"torch", "transformers", "numpy", "bitsandbytes", "rich", "tokenizers"}
NO_ROOM_IS_CALLED = {"utils", "util", "common", "helpers", "helper", "misc"}
LINES = 400

CORE_FILES = sorted(PACKAGE.rglob("*.py"))
PLUGIN_FILES = sorted(PLUGINS.glob("*/src/**/*.py"))


def room(path: Path) -> str:
    """The folder or module directly below ``eulerforge``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST, *, into_functions: bool) -> Iterator[str]:
    """Dotted names of the modules imported below ``node`` at run time."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import in line {child.lineno}: write the full name"
            module = child.module or ""
            # `from eulerforge import config` names a room as well
            yield from (f"{module}.{alias.name}" for alias in child.names)
        elif type_checking(child):
            rest = ast.Module(body=child.orelse, type_ignores=[])  # type: ignore[attr-defined]
            yield from imports(rest, into_functions=into_functions)
        elif into_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, into_functions=into_functions)


def imported(path: Path, *, into_functions: bool = True) -> set[str]:
    return set(imports(ast.parse(path.read_text(encoding="utf-8")), into_functions=into_functions))


def rooms_used(path: Path) -> set[str]:
    parts = (name.split(".") for name in imported(path))
    return {name[1] for name in parts if name[0] == "eulerforge" and len(name) > 1 and not name[1].startswith("__")}


def test_there_is_something_to_hold():
    assert len(CORE_FILES) > 30
    assert len(PLUGIN_FILES) > 8
    assert {room(path) for path in CORE_FILES} - {"__init__"} <= set(ALLOWED)


ROOMS = [path for path in CORE_FILES if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", ROOMS, ids=short)
def test_the_core_imports_only_lower_floors(path: Path):
    own = room(path)
    assert rooms_used(path) - {own} <= ALLOWED[own]


@pytest.mark.parametrize("path", PLUGIN_FILES, ids=short)
def test_plugins_use_only_what_authors_may_use(path: Path):
    assert rooms_used(path) <= PLUGINS_MAY_USE


@pytest.mark.parametrize("path", CORE_FILES, ids=short)
def test_light_floors_import_nothing_heavy(path: Path):
    if room(path) in (*LIGHT, "__init__"):
        assert not {name.split(".")[0] for name in imported(path, into_functions=False)} & HEAVY


@pytest.mark.parametrize("path", [path for path in PLUGIN_FILES if path.stem in ("plugin", "config")], ids=short)
def test_entry_and_config_modules_are_light(path: Path):
    names = imported(path, into_functions=False)
    assert not {name.split(".")[0] for name in names} & HEAVY
    assert not {name for name in names if name.startswith(("eulerforge.lora", "eulerforge.models"))}


@pytest.mark.parametrize("path", CORE_FILES + PLUGIN_FILES, ids=short)
def test_size_name_and_docstring(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LINES
    assert path.stem not in NO_ROOM_IS_CALLED
    assert not NO_ROOM_IS_CALLED & set(path.relative_to(ROOT).parts[:-1])
    assert not text.strip() or ast.get_docstring(ast.parse(text))


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path):
    source = tmp_path / "module.py"
    source.write_text(
        "from typing import TYPE_CHECKING\nfrom eulerforge import config\nimport torch.nn\n"
        "if TYPE_CHECKING:\n    import numpy\nelse:\n    import rich\n"
        "try:\n    import yaml\nexcept ImportError:\n    pass\n"
        "class C:\n    import attrs\n    def f(self):\n        from eulerforge.training import loop\n"
    )
    assert imported(source, into_functions=False) == {
        "typing.TYPE_CHECKING",
        "eulerforge.config",
        "torch.nn",
        "rich",
        "yaml",
        "attrs",
    }
    assert rooms_used(source) == {"config", "training"}
