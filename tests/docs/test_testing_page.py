"""The page of the author kit against the kit: every class, every test with its own words, every attribute."""

from __future__ import annotations

import inspect
import re

import pages
import pytest

import eulerforge.testing as kit

PAGE = pages.ROOT / "docs" / "reference" / "testing.md"
CLASSES = [getattr(kit, name) for name in kit.__all__ if name.endswith("Conformance")]


def section(kind: type) -> str:
    return PAGE.read_text(encoding="utf-8").split(f"\n## {kind.__name__}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_test_is_listed_in_its_own_words(kind: type) -> None:
    shown = dict(re.findall(r"^\| `(test_\w+)` \| (.*) \|$", section(kind), re.MULTILINE))
    assert shown == {
        name: (inspect.getdoc(value) or "").splitlines()[0]
        for name, value in inspect.getmembers(kind, inspect.isfunction)
        if name.startswith("test_")
    }


@pytest.mark.parametrize("kind", CLASSES)
def test_every_attribute_is_listed(kind: type) -> None:
    own = {
        name
        for base in kind.__mro__[:-1]
        for name, value in vars(base).items()
        if not name.startswith("_") and not inspect.isfunction(value)
    }
    table = section(kind).split("| test |")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    names = {name for cell in cells for name in re.findall(r"`(\w+)[`(]", cell)}
    assert own <= names
    assert all(hasattr(kind, name) for name in names)


def test_the_example_is_what_plugins_new_writes() -> None:
    (block,) = (block.text for block in pages.blocks(PAGE) if block.language == "python")
    written = pages.ROOT / "tests" / "thirdparty" / "eulerforge-backbone-olmo2" / "tests" / "test_conformance.py"
    assert written.read_text(encoding="utf-8").endswith(block)
