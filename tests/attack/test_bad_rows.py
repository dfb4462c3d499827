"""Bad rows by the hundred, each between good ones: every message names the file, the true line and the key.

None passes, none shows a traceback, and a bomb costs neither time nor memory to speak of.
"""

from __future__ import annotations

import json
import time
import tracemalloc
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import rowforge
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eulerforge.cli.main import main
from eulerforge.data.files import DataFile
from eulerforge.data.read import BadRows, read_rows
from eulerforge.data.rows import RowParser

ENOUGH = 300
GOOD = [json.dumps(row).encode() for row in rowforge.GOOD.values()]
VOCABULARY = 1000
CONTROL = ("Cc", "Cs", "Zl", "Zp")  # not Cn: what Unicode will name one day steers nothing


def problems_of(path: Path, *, processed: bool = False) -> tuple[BadRows, list[int]]:
    """What is wrong with a file, and the lines of its good rows."""
    bad = BadRows()
    parser = RowParser({}, processed=processed, vocabulary=VOCABULARY)
    parsed = [parser.parse(row, bad) for row in read_rows(DataFile(name=path.name, path=path), bad)]
    return bad, [row.place for row in parsed if row is not None]


def attacked(folder: Path, bad: rowforge.BadLine, number: int, good: bytes, *, processed: bool = False) -> str:
    """What is wrong with what was said of a line; empty when all is well."""
    place = number % 4
    end = (b"\n", b"\r\n")[number % 2]
    before = [good, b"", b"   ", good][:place]
    path = folder / "rows.jsonl"
    last = b"" if number % 3 else end
    path.write_bytes(end.join([good, *before, bad.raw, good]) + last)
    found, lines = problems_of(path, processed=processed)
    line = place + 2
    expected = [1, *(index for index, text in enumerate(before, 2) if text.strip()), line + 1]
    if found.total != 1 or lines != expected:
        return f"{found.total} problems, good rows on {lines} instead of {expected}"
    (problem,) = found.problems
    if problem.source != f"rows.jsonl:{line}":
        return f"it is named {problem.source}, not line {line}"
    if bad.key and not (problem.key or "").startswith(bad.key):
        return f"it names the key {problem.key}, not {bad.key}: {problem.message}"
    if any(not text.isprintable() for text in problem.lines()) or len(problem.message) > 2000:
        return f"the message is no plain line: {problem.message[:200]!r}"
    return ""


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
def test_every_bad_row_is_named_by_its_file_true_line_and_key(tmp_path: Path, processed: bool) -> None:
    kinds: Counter[str] = Counter()
    wrong = []
    lines = rowforge.bad_processed() if processed else rowforge.bad_lines()
    for number, bad in enumerate(lines):
        kinds[bad.kind] += 1
        good = json.dumps(rowforge.PROCESSED).encode() if processed else GOOD[number % len(GOOD)]
        if fault := attacked(tmp_path, bad, number, good, processed=processed):
            wrong.append(f"{bad.kind}: {bad.raw[:100]!r}: {fault}")
    assert not wrong, f"{len(wrong)} of {kinds.total()}\n" + "\n".join(wrong[:40])
    assert kinds.total() >= (70 if processed else ENOUGH), kinds


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
columns = st.sampled_from(
    ["prompt", "response", "text", "messages", "conversations", "instruction", "input", "output", "input_ids", "x"]
)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(row=st.dictionaries(columns, json_values, max_size=4))
def test_any_object_is_a_row_or_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD[0] + b"\n\n" + json.dumps(row).encode("ascii") + b"\n")
    found, lines = problems_of(path)
    assert found.total + len(lines) == 2
    for problem in found.problems:
        assert problem.source == "rows.jsonl:3"
        assert not any(unicodedata.category(letter) in CONTROL for line in problem.lines() for letter in line)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(raw=st.binary(max_size=60).filter(lambda raw: b"\n" not in raw))
def test_any_bytes_are_a_row_or_blank_or_named(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD[0] + b"\n" + raw + b"\n" + GOOD[1] + b"\n")
    found, lines = problems_of(path)
    assert lines == [1, 3]
    assert found.total == bool(raw.strip())
    assert all(problem.source == "rows.jsonl:2" for problem in found.problems)


def test_bombs_are_refused_in_bounded_time_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for bomb in rowforge.malformed():
        if bomb.kind not in ("bomb", "long"):
            continue
        path.write_bytes(bomb.raw + b"\n")
        tracemalloc.start()
        began = time.process_time()
        found, _ = problems_of(path)
        seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert found.total == 1
        assert seconds < 5
        assert peak < 20 * len(bomb.raw) + 2**20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("bad-rows") / "base")


def test_the_command_line_names_them_all_and_exits_with_2(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [one for one in rowforge.bad_lines() if one.kind in ("type", "unknown role", "no UTF-8")][:18]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(one.raw + b"\n" + GOOD[0] + b"\n" for one in bad))
    words = ["data", "preview", "--set", f"model_name={base}", "--set", f"data.path={path}"]
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in errors] == [f"{path}:{2 * index + 1}" for index in range(len(bad))]
    assert all(line.startswith(("error: ", "hint: ")) and line.isprintable() for line in said)
