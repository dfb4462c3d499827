"""Lines of keys, and everything that a preset file may not be."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eulerforge.config.document import MAX_BYTES, read_document
from eulerforge.config.overrides import parse_override, parse_value
from eulerforge.config.suggest import nearest
from eulerforge.config.toml_reader import key_lines
from eulerforge.errors import ConfigError


def read(tmp_path: Path, text: str | bytes, name: str) -> object:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_document(path)


def test_toml_lines_of_tables_dotted_keys_arrays_and_strings_that_look_like_keys() -> None:
    text = '''top = 1
text = """
not_a_key = 2
[not.a.table]
"""
[training] # comment = 3
lr = "a = b"
many = [
  1,
  2, # x = 1
]
"quoted key" = 1
a.b = 2
[[training.phases]]
step = 0
[[training.phases]]
step = 5
inline = { one = 1 }
'''
    lines = key_lines(text)
    assert lines == {
        "top": 1,
        "text": 2,
        "training": 6,
        "training.lr": 7,
        "training.many": 8,
        "training.quoted key": 12,
        "training.a": 13,
        "training.a.b": 13,
        "training.phases": 14,
        "training.phases.0": 14,
        "training.phases.0.step": 15,
        "training.phases.1": 16,
        "training.phases.1.step": 17,
        "training.phases.1.inline": 18,
    }


@pytest.mark.parametrize(
    ("value", "part"),
    [("on", "a truth value"), ("no", "a truth value"), ("012", "another number"), ("1:30", "another number"),
     ("2026-01-01", "a date"), ("1_000", "another number"), ("0x10", "another number")],
)  # fmt: skip
def test_yaml_surprises_are_refused_with_their_line(tmp_path: Path, value: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"a: 1\nb:\n  c: {value}\n", "p.yml")
    (problem,) = caught.value.problems
    assert part in problem.message
    assert (problem.key, problem.source) == ("b.c", f"{tmp_path}/p.yml:3")
    otherwise = "true or false" if part == "a truth value" else "a plain decimal number"
    assert problem.hint == f"write '{value}' in quotes for text, or {otherwise}"


def test_yaml_numbers_words_and_quotes(tmp_path: Path) -> None:
    text = "a: 2e-5\nb: 1.0e-5\nc: -3\nd: 'no'\ne: true\nf: null\ng: plain\nh: .5\n"
    document = read(tmp_path, text, "p.yaml")
    assert document.tree == {  # type: ignore[attr-defined]
        "a": 2e-5, "b": 1e-5, "c": -3, "d": "no", "e": True, "f": None, "g": "plain", "h": 0.5,
    }  # fmt: skip


BOMB = "a: &a [x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20))


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("p.toml", "a = 1\na = 2\n", ""),
        ("p.toml", "a = \n", ""),
        ("p.yml", "a: 1\na: 2\n", "the key stands twice"),
        ("p.yml", BOMB, "alias"),
        ("p.yml", "a: " + "[" * 100 + "]" * 100, "nested too deeply"),
        ("p.toml", "a = " + "[" * 5000 + "]" * 5000, ""),
        ("p.yml", "a: [1\n", ""),
        ("p.yml", "a: !!python/object/apply:os.system ['true']\n", "is refused"),
        ("p.yml", "- 1\n", "mapping"),
        ("p.toml", b"a = '\xff'", "UTF-8"),
        ("p.toml", "#" * (MAX_BYTES + 1), "larger"),
        ("p.json", "{}", "ends in"),
    ],
)
def test_malformed_files_are_one_line_with_the_file(tmp_path: Path, name: str, text: str | bytes, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, name)
    problem = caught.value.problems[0]
    assert part in problem.message
    assert str(tmp_path / name) in (problem.source or "")
    assert "\n" not in problem.message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=2e-5", 2e-5), ("a.b=3", 3), ("a.b=true", True), ("a.b=raw", "raw"), ("a.b='3'", "3"), ("a.b=", ""),
        ("a.b=[q_proj, v_proj]", ["q_proj", "v_proj"]), ('a.b=["x"]', ["x"]), ("a.b=null", None),
        ("a.b=x=y", "x=y"), ("a.b=data/rows.jsonl", "data/rows.jsonl"), ("a.b=2026-01-01", "2026-01-01"),
    ],
)  # fmt: skip
def test_override_values(text: str, value: object) -> None:
    assert parse_override(text) == ("a.b", value)


@given(st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), st.booleans()))
def test_an_override_of_a_scalar_is_that_scalar(value: object) -> None:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@given(st.text(max_size=60))
def test_no_override_text_raises_anything_but_our_error(text: str) -> None:
    try:
        parse_override(text)
    except ConfigError as error:
        assert error.problems[0].hint  # noqa: PT017 - either outcome is fine, an error has a hint


@pytest.mark.parametrize(
    ("wrong", "right"), [("l", "lr"), ("rl", "lr"), ("lx", "lr"), ("warmpu_steps", "warmup_steps")]
)
def test_one_slip_finds_the_shortest_names_too(wrong: str, right: str) -> None:
    assert nearest(wrong, ["lr", "warmup_steps", "eps", "seed"]) == right


def test_nothing_near_is_nothing() -> None:
    assert nearest("zebra", ["lr", "eps"]) is None
