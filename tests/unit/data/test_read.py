"""Reading rows: true line numbers whatever is inside the lines, and every bad line named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eulerforge.data.files import DataFile, find_files
from eulerforge.data.read import SHOWN_ALIKE, BadRows, SourceRow, read_rows
from eulerforge.errors import DataError


def read(path: Path) -> tuple[list[SourceRow], BadRows]:
    bad = BadRows()
    return list(read_rows(DataFile(name=path.name, path=path), bad)), bad


def write(folder: Path, content: bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}\n{"a": 2}\n',
        b'{"a": 1}\n{"a": 2}',
        b'{"a": 1}\r\n{"a": 2}\r\n',
        b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n',
    ],
    ids=["plain", "no last newline", "CRLF", "BOM"],
)
def test_two_rows(tmp_path: Path, content: bytes) -> None:
    rows, bad = read(write(tmp_path, content))
    assert [(row.data, row.line, row.where) for row in rows] == [
        ({"a": 1}, 1, "rows.jsonl:1"),
        ({"a": 2}, 2, "rows.jsonl:2"),
    ]
    assert not bad.total


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    rows, bad = read(write(tmp_path, b'\n{"a": 1}\n  \r\n\n{"a": 2}\n\n'))
    assert [row.line for row in rows] == [2, 5]
    assert not bad.total


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, separator: str) -> None:
    # Control characters must be escaped inside JSON; the Unicode separators may stand there as they are.
    raw = json.dumps({"a": f"x{separator}y"}, ensure_ascii=False)
    rows, bad = read(write(tmp_path, (raw + '\n{"a": 2}\n').encode()))
    assert [row.line for row in rows] == [1, 2]
    assert rows[0].data["a"] == f"x{separator}y"
    assert not bad.total


def test_a_line_of_five_megabytes(tmp_path: Path) -> None:
    text = "é" * 2_500_000
    content = json.dumps({"text": text}, ensure_ascii=False).encode() + b'\n{"text": 1,}\n'
    rows, bad = read(write(tmp_path, content))
    assert rows[0].data["text"] == text
    assert [problem.source for problem in bad.problems] == ["rows.jsonl:2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b"\x00", "not valid JSON"),
        (b'{"a": "caf\xe9"}', "not UTF-8: byte 0xe9 at byte 11 of the line"),
        (b"[1, 2]", "a row must be a JSON object, this is an array"),
        (b'"text"', "this is a string"),
        (b"3", "this is a number"),
        (b"null", "this is null"),
        (b"true", "this is true or false"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "cannot be read"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "cannot be read"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, message: str) -> None:
    rows, bad = read(write(tmp_path, b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n'))
    assert [row.line for row in rows] == [1, 4]
    (problem,) = bad.problems
    assert problem.source == "rows.jsonl:3"
    assert message in problem.message


def test_utf_16_is_said_once(tmp_path: Path) -> None:
    _, bad = read(write(tmp_path, '{"a": 1}\n{"a": 2}\n'.encode("utf-16")))
    assert [(problem.source, problem.message) for problem in bad.problems] == [
        ("rows.jsonl:1", "the file is UTF-16, not UTF-8")
    ]


def test_an_array_in_a_lines_file_is_told_how_to_be_named(tmp_path: Path) -> None:
    _, bad = read(write(tmp_path, b'[{"a": 1}]'))
    assert bad.problems[0].hint == "a file that is one JSON array must be named .json"


def test_five_problems_of_a_kind_are_shown_and_of_the_others_lines(tmp_path: Path) -> None:
    _, bad = read(write(tmp_path, b"x\n" * 1025 + b"3\n" + b"4\n" * 5))
    with pytest.raises(DataError) as caught:
        bad.raise_if_any()
    problems = caught.value.problems
    shown = [f"rows.jsonl:{line}" for line in (1, 2, 3, 4, 5, 1026, 1027, 1028, 1029, 1030)]
    assert [problem.source for problem in problems[:-2]] == shown
    syntax = "not valid JSON: Expecting value at column 1"
    assert problems[0].message == syntax
    more = "1,020 more rows like these: lines 6, 7, 8, 9, 10 of rows.jsonl and 1,015 more"
    assert (problems[-2].message, problems[-2].hint) == (f"{syntax}: {more}", problems[0].hint)
    assert problems[-1].message.endswith("1 more row like these: line 1031 of rows.jsonl")


def test_twenty_problems_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    _, bad = read(write(tmp_path, b"".join(b" " * number + b"x\n" for number in range(1025))))
    with pytest.raises(DataError) as caught:
        bad.raise_if_any()
    problems = caught.value.problems
    assert [problem.source for problem in problems[:-1]] == [f"rows.jsonl:{line}" for line in range(1, 21)]
    assert problems[-1].message == "1,005 more problems like these are not shown"


class TestArray:
    def test_lines_and_elements(self, tmp_path: Path) -> None:
        content = b'\xef\xbb\xbf [\n{"a": 1},\r\n\n{"a":\n 2}, {"a": 3}\n]\n'
        rows, bad = read(write(tmp_path, content, "rows.json"))
        assert [(row.data["a"], row.where) for row in rows] == [
            (1, "rows.json:2[0]"),
            (2, "rows.json:4[1]"),
            (3, "rows.json:5[2]"),
        ]
        assert not bad.total

    def test_empty(self, tmp_path: Path) -> None:
        rows, bad = read(write(tmp_path, b"[ ]", "rows.json"))
        assert (rows, bad.total) == ([], 0)

    @pytest.mark.parametrize(
        ("content", "source", "message"),
        [
            (b'[{"a": 1},\n 7]', "rows.json:2[1]", "this is a number"),
            (b'[{"a": 1},\n{"a": }]', "rows.json:2[1]", "not valid JSON"),
            (b'[{"a": 1},\n]', "rows.json:2[1]", "not valid JSON"),
            (b'[{"a": 1}\n\n{"a": 2}]', "rows.json:3[0]", "a comma or ] is missing"),
            (b'[{"a": 1}\n', "rows.json:2[0]", "a comma or ] is missing"),
            (b'[{"a": 1}]\n]', "rows.json:2", "text after the end"),
            (b'[{"a":\n"\xff"}]', "rows.json:2", "not UTF-8: byte 0xff at byte 2 of the line"),
        ],
    )
    def test_what_is_wrong_is_placed(self, tmp_path: Path, content: bytes, source: str, message: str) -> None:
        _, bad = read(write(tmp_path, content, "rows.json"))
        assert bad.problems[0].source == source
        assert message in bad.problems[0].message

    def test_json_lines_under_the_name_json(self, tmp_path: Path) -> None:
        rows, _ = read(write(tmp_path, b'{"a": 1}\n{"a": 2}\n', "rows.json"))
        assert [row.where for row in rows] == ["rows.json:1", "rows.json:2"]

    def test_one_object_is_said_once(self, tmp_path: Path) -> None:
        _, bad = read(write(tmp_path, b'{\n "faq": [\n {"a": 1}\n]\n}', "rows.json"))
        assert [problem.message for problem in bad.problems] == ["the file is one JSON object, not rows"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)
lines = st.one_of(
    st.dictionaries(st.text(), json_values, max_size=3),
    st.sampled_from(["", "  ", "\t"]),  # blank
    st.sampled_from(["{", "[1]", "nonsense", '{"a" 1}']),  # bad
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# more that are bad in the same way would be counted, not named
@given(content=st.lists(lines, max_size=SHOWN_ALIKE), crlf=st.booleans(), ascii_only=st.booleans(), last=st.booleans())
def test_every_line_is_a_row_or_blank_or_named(
    tmp_path: Path, content: list[Any], crlf: bool, ascii_only: bool, last: bool
) -> None:
    written = [json.dumps(line, ensure_ascii=ascii_only) if isinstance(line, dict) else line for line in content]
    end = "\r\n" if crlf else "\n"
    text = end.join(written) + (end if last else "")
    rows, bad = read(write(tmp_path, text.encode("utf-8", "surrogatepass")))
    expected_rows = {number: line for number, line in enumerate(content, 1) if isinstance(line, dict)}
    expected_bad = [
        f"rows.jsonl:{number}" for number, line in enumerate(content, 1) if isinstance(line, str) and line.strip()
    ]
    assert {row.line: row.data for row in rows} == expected_rows
    assert [problem.source for problem in bad.problems] == expected_bad


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("row.jsonl", "does not exist", "did you mean"),
        ("folder", "is a folder", "inside.jsonl"),
        ("rows.parquet", ".parquet files are not read", "JSON lines"),
        ("nowhere/rows.jsonl", "does not exist", "there is no folder"),
        ("pkg://no_such_rows/a.jsonl", "not installed", "pip install no-such-rows"),
    ],
)
def test_files_that_are_not_there(tmp_path: Path, name: str, message: str, hint: str) -> None:
    write(tmp_path, b"", "rows.jsonl")
    write(tmp_path, b"", "rows.parquet")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder", b"", "inside.jsonl")
    given_name = name if name.startswith("pkg:") else str(tmp_path / name)
    with pytest.raises(DataError) as caught:
        find_files([given_name, str(tmp_path / "also-absent.jsonl")])
    assert len(caught.value.problems) == 2
    problem = caught.value.problems[0]
    assert problem.key == "data.path"
    assert message in problem.message
    assert hint in str(problem.hint)


def test_no_file_is_named() -> None:
    with pytest.raises(DataError, match="no data file is named"):
        find_files([])
