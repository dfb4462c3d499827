"""The types that a plugin may declare for its keys: each is read strictly, and says what it wants."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Literal

import attrs
import pytest

from eulerforge.config.structure import Structurer, as_tree


@attrs.frozen
class Range:
    low: int
    high: int = 9


class Colour(Enum):
    RED = "red"


@attrs.frozen(kw_only=True)
class Settings:
    words: list[str] = attrs.field(factory=list)
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[int, ...] = ()
    either: int | str = 1
    mode: Literal["fast", "slow"] = "fast"
    table: dict[str, float] = attrs.field(factory=dict)
    sizes: Mapping[str, int] | None = None
    window: Range | None = None
    windows: list[Range] = attrs.field(factory=list)
    by_name: Mapping[str, Range] = attrs.field(factory=dict)
    colour: Colour = Colour.RED
    shades: Literal[Colour.RED] = Colour.RED
    bare: list = attrs.field(factory=list)  # type: ignore[type-arg]
    old: typing.List = attrs.field(factory=list)  # type: ignore[type-arg]  # noqa: UP006
    names: Sequence[str] = ()
    unordered: frozenset[str] = frozenset()
    by_number: dict[int, float] = attrs.field(factory=dict)
    by_word: dict[Literal["q", "v"], int] = attrs.field(factory=dict)


def read(**tree: Any) -> tuple[Any, list[tuple[str | None, str, str | None]]]:
    structurer = Structurer([], set())
    made = structurer.structure(Settings, tree)
    return made, [(problem.key, problem.message, problem.hint) for problem in structurer.problems]


@pytest.mark.parametrize(
    ("key", "value", "becomes"),
    [
        ("words", ["a", "b"], ["a", "b"]),
        ("pair", [3, 4], (3, 4.0)),
        ("many", [1, 2, 3], (1, 2, 3)),
        ("either", "x", "x"),
        ("either", 7, 7),
        ("mode", "slow", "slow"),
        ("table", {"a": 1}, {"a": 1.0}),
        ("sizes", {"a": 1}, {"a": 1}),
        ("sizes", None, None),
        ("window", {"low": 1}, Range(1)),
        ("window", None, None),
        ("windows", [{"low": 1}, {"low": 2, "high": 3}], [Range(1), Range(2, 3)]),
        ("by_name", {"a": {"low": 1}}, {"a": Range(1)}),
        ("colour", "red", Colour.RED),
        ("shades", "red", Colour.RED),
        ("bare", ["a", 1], ["a", 1]),
        ("old", ["a", 1], ["a", 1]),
        ("names", ["a", "b"], ("a", "b")),
        ("unordered", ["a", "b"], frozenset({"a", "b"})),
        ("by_word", {"q": 1}, {"q": 1}),
    ],
)
def test_what_is_meant_is_read(key: str, value: Any, becomes: Any) -> None:
    made, problems = read(**{key: value})
    assert not problems
    assert getattr(made, key) == becomes


@pytest.mark.parametrize(
    ("key", "value", "where", "message"),
    [
        ("words", "ab", "words", "a list is wanted, not the text 'ab'"),
        ("words", [1], "words", "text is wanted, not 1"),
        ("pair", [1, 2.0, 3], "pair", "a list of 2 values is wanted, not of 3"),
        ("pair", [1.5, 2.0], "pair", "a whole number is wanted, not 1.5"),
        ("either", True, "either", "a whole number or text is wanted, not true"),
        ("either", None, "either", "a whole number or text is wanted, not null"),
        ("mode", "fats", "mode", "'fats' is not allowed"),
        ("mode", 1, "mode", "1 is not allowed"),
        ("table", [1], "table", "a table is wanted, not a list"),
        ("table", {"a": "b"}, "table", "a number is wanted, not the text 'b'"),
        ("sizes", {"a": 1.5}, "sizes", "a whole number is wanted, not 1.5"),
        ("window", {"low": 1, "hihg": 2}, "window.hihg", "unknown key 'hihg'"),
        ("window", 3, "window", "a table is wanted, not 3"),
        ("windows", [{"low": 1}, {"low": "x"}], "windows.1.low", "a whole number is wanted, not the text 'x'"),
        ("by_name", {"a": {"low": 1, "hihg": 2}}, "by_name", "Extra fields in constructor for Range: hihg"),
        ("shades", "blue", "shades", "'blue' is not allowed"),
        ("bare", "ab", "bare", "a list is wanted, not the text 'ab'"),
        ("old", "ab", "old", "a list is wanted, not the text 'ab'"),
        ("names", "ab", "names", "a list is wanted, not the text 'ab'"),
        ("unordered", "ab", "unordered", "a list is wanted, not the text 'ab'"),
        ("by_number", {"0": 1.0}, "by_number", "a whole number is wanted, not the text '0'"),
        ("by_word", {"k": 1}, "by_word", "'k' is not allowed"),
        ("colour", "blue", "colour", "'blue' cannot be read as Colour: "),
    ],
)
def test_what_is_not_meant_is_refused(key: str, value: Any, where: str, message: str) -> None:
    made, problems = read(**{key: value})
    assert made is None
    ((found, said, _),) = problems
    assert found == where
    assert message in said


def test_a_near_option_is_the_hint() -> None:
    _, ((_, _, hint),) = read(mode="fats")
    assert hint == "did you mean fast? allowed: fast, slow"


def test_lists_of_tables_are_written_as_they_were_read() -> None:
    made, _ = read(windows=[{"low": 1}])
    assert as_tree(made)["windows"] == [{"low": 1, "high": 9}]
