"""How a check of the kit fails: one sentence that names the bug, and how to mend it."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Iterator

from eulerforge.errors import EulerForgeError


class Nonconforming(AssertionError):
    """The plugin does not keep the contract; the message says what is wrong and how to mend it."""


def require(holds: bool, wrong: str, mend: str) -> None:
    """Fail with ``wrong: mend`` unless ``holds``; unlike ``assert`` it cannot be switched off.

    Raises:
        Nonconforming: ``holds`` is False.
    """
    __tracebackhide__ = True
    if not holds:
        raise Nonconforming(f"{wrong}: {mend}")


@contextlib.contextmanager
def blamed(doing: str, mend: str) -> Iterator[None]:
    """Anything that is raised inside becomes a fault that says what was being done.

    Raises:
        Nonconforming: the block raised.
    """
    __tracebackhide__ = True
    try:
        yield
    except Nonconforming:
        raise
    except EulerForgeError as error:
        raise Nonconforming(f"{doing} is refused, {error}: {error.problems[0].hint or mend}") from error
    except Exception as error:
        raise Nonconforming(f"{doing} raises {type(error).__name__}, {error}: {mend}") from error


def nearest(word: str, names: Collection[str]) -> str:
    """``nearest is NAME``, or what there is when nothing is near."""
    near = difflib.get_close_matches(word, sorted(names), n=1)
    if near:
        return f"nearest is {near[0]}"
    return f"there are {', '.join(sorted(names))}" if names else "there are none"


def listed(names: Collection[str], limit: int = 4) -> str:
    """The first names, and how many more there are."""
    shown = list(names)[:limit]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
