"""Preset files that are made to cost time or memory: refused, or read, within a bound of both."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from pathlib import Path

import pytest

from eulerforge.config.document import MAX_BYTES, read_document
from eulerforge.config.overrides import parse_override
from eulerforge.errors import ConfigError

M = MAX_BYTES - 100
BOMBS = {
    "dotted key.toml": ".".join(["a"] * (M // 2)) + " = 1",
    "dotted header.toml": "[" + ".".join(["a"] * (M // 2)) + "]",
    "many headers.toml": "".join(f"[a{i}]\n" for i in range(M // 9)),
    "many tables.toml": "[[a]]\n" * (M // 6),
    "long integer.toml": "b = 1\na = " + "9" * M,
    "nested lists.toml": "a = " + "[" * M,
    "nested tables.toml": "a = " + "{a=" * (M // 3),
    "backslashes.toml": 'a = "' + "\\" * M,
    "quotes.toml": '"' * M,
    "spaces after a bracket.toml": "[" + " " * M,
    "spaces after a key.toml": "a" + " " * M,
    "line feeds in a string.toml": 'a = """' + "\n" * M + '"""',
    "long integer.yml": "b: 1\na: " + "9" * M,
    "base 60.yml": "a: " + "1:" * (M // 2) + "1",
    "nested lists.yml": "[" * M,
    "nested maps.yml": "{a: " * (M // 4),
    "aliases.yml": "a: &a [x]\n" + "".join(f"b{i}: [*a, *a]\n" for i in range(M // 16)),
    "merge keys.yml": "a: &a {x: 1}\nb:\n  <<: *a\n",
    "tags.yml": "a: !" + "x" * M,
    "documents.yml": "---\n" * (M // 4),
    "sequence.yml": "a: [" + "1," * (M // 2 - 10) + "]",
    "question marks.yml": "? " * (M // 2),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_little(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(BOMBS[name], encoding="utf-8")
    began = time.process_time()
    try:
        read_document(path)
    except ConfigError as error:
        problem = error.problems[0]
        assert (problem.source or "").startswith(str(path))
        assert all(line.isprintable() and len(line) < 2100 for line in problem.lines())
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", ["aliases.yml", "sequence.yml", "nested lists.toml", "many tables.toml"])
def test_a_bomb_takes_little_room(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(BOMBS[name], encoding="utf-8")
    tracemalloc.start()
    with contextlib.suppress(ConfigError):
        read_document(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * 2**20


@pytest.mark.parametrize(("name", "line"), [("long integer.toml", 2), ("long integer.yml", 2)])
def test_a_number_of_too_many_digits_is_named(tmp_path: Path, name: str, line: int) -> None:
    path = tmp_path / name
    path.write_text(BOMBS[name], encoding="utf-8")
    with pytest.raises(ConfigError, match="more than 4,300 digits") as caught:
        read_document(path)
    assert (caught.value.problems[0].source, caught.value.problems[0].key) == (f"{path}:{line}", "a")


def test_an_override_with_too_many_digits_is_text() -> None:
    digits = "9" * 5000
    assert parse_override(f"seed={digits}") == ("seed", digits)


@pytest.mark.parametrize(
    ("name", "text", "line", "key"),
    [
        ("a.toml", "[training]\nlr = 1\nlr = 2\n", 3, "training.lr"),
        ("a.toml", "[training]\n[training]\n", 2, "training"),
        ("a.toml", "[data]\nx = 1\n[training]\nlr = \n", 4, "training.lr"),
        ("a.yml", "training:\n  lr: 1\n  lr: 2\n", 3, "training.lr"),
    ],
)
def test_what_is_malformed_is_named_by_key_and_line(tmp_path: Path, name: str, text: str, line: int, key: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_document(path)
    problem = caught.value.problems[0]
    assert (problem.source, problem.key) == (f"{path}:{line}", key)
    assert problem.hint
