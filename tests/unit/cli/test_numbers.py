"""Whole numbers on the command line."""

from __future__ import annotations

import argparse

import pytest

from eulerforge.cli.numbers import at_least


def test_the_bound_itself_is_allowed() -> None:
    assert at_least(1)("1") == 1
    assert at_least(0)("007") == 7


@pytest.mark.parametrize(
    ("text", "message"), [("0", "0 is less than 1"), ("-3", "-3 is"), ("2.5", "is not"), ("", "is not")]
)
def test_what_is_refused_says_why(text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        at_least(1)(text)
