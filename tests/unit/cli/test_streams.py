"""Output that nobody reads any more."""

from __future__ import annotations

import os
import subprocess
import sys
from io import BytesIO, StringIO, TextIOWrapper

import pytest

from eulerforge.cli.streams import Unbreakable, unbreakable_output


def test_a_pipe_without_a_reader_takes_everything_and_says_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        output = Unbreakable(stream)
        assert output.write("x" * 100_000) == 100_000
        output.flush()
        assert output.write("more") == 4
        stream.write("the descriptor itself leads nowhere now")
        stream.flush()
        assert output.isatty() is False


def test_a_stream_that_is_closed_or_has_no_descriptor() -> None:
    closed = StringIO()
    closed.close()
    output = Unbreakable(closed)
    assert output.write("ab") == 2
    output.flush()


def test_the_streams_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with unbreakable_output():
        print("out")
        print("err", file=sys.stderr)
        assert isinstance(sys.stdout, Unbreakable)
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("out\n", "err\n")


@pytest.mark.parametrize("closed", ["", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_command_started_with_closed_streams(closed: str) -> None:
    """The files that it opens must not get the places of stdout and stderr."""
    code = (
        "import os, sys\nfrom eulerforge.cli.streams import open_standard_streams\nopen_standard_streams()\n"
        "print('out'); print('err', file=sys.stderr)\n"
        "sys.exit(10 + os.open(os.devnull, os.O_RDONLY))"
    )
    ran = subprocess.run(["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code], capture_output=True, text=True)
    assert ran.returncode >= 13, ran.stderr
    assert (ran.stdout == "out\n") == ("1>&-" not in closed)
    assert (ran.stderr == "err\n") == ("2>&-" not in closed)


@pytest.mark.parametrize("arguments", [["presets", "list"], ["plugins", "list", "--json"], ["frobnicate"]])
def test_a_reader_that_went_away_is_no_error_and_the_code_stays(arguments: list[str]) -> None:
    plain = subprocess.run([sys.executable, "-m", "eulerforge", *arguments], capture_output=True, text=True)
    reader, writer = os.pipe()
    os.close(reader)
    unheard = subprocess.run([sys.executable, "-m", "eulerforge", *arguments], stdout=writer, stderr=writer)
    os.close(writer)
    assert unheard.returncode == plain.returncode


def test_what_the_encoding_lacks_is_escaped_and_the_rest_still_comes() -> None:
    raw = BytesIO()
    output = Unbreakable(TextIOWrapper(raw, encoding="ascii"))
    output.write("run \ud55c\n")
    output.write("after\n")
    output.flush()
    assert raw.getvalue() == b"run \\ud55c\nafter\n"
