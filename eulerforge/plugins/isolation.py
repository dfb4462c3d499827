"""Run a plugin's code so that whatever it does, the tool goes on: the only place that catches everything.

Notable: ``SystemExit`` is caught too, because ``sys.exit`` in a plugin must not end the command without a word.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from eulerforge.errors import first_line

T = TypeVar("T")


class PluginFailure(Exception):
    """Plugin code did not do what was asked; ``trace`` is the traceback's text, if there was one."""

    def __init__(self, reason: str, *, hint: str = "", trace: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint
        self.trace = trace


def isolated(doing: str, call: Callable[[], T]) -> T:
    """The result of ``call``; what it prints goes to stderr, so that stdout stays data.

    Raises:
        PluginFailure: anything but KeyboardInterrupt was raised; a PluginFailure from inside keeps its words.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return call()
    except (KeyboardInterrupt, PluginFailure):
        raise
    except SystemExit as error:
        raise PluginFailure(
            f"it called sys.exit({error.code!r}) while {doing}", trace=traceback.format_exc()
        ) from error
    except BaseException as error:  # plugin code may raise anything, GeneratorExit included
        first = first_line(error, "no message")
        raise PluginFailure(
            f"{type(error).__name__} while {doing}: {first}", hint=_hint(error), trace=traceback.format_exc()
        ) from error


def _hint(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the module {error.name} is not there: reinstall the plugin with its dependencies"
    return ""


def import_target(target: str) -> Any:
    """The object that ``"package.module:attribute"`` names.

    Raises:
        PluginFailure: the module cannot be imported or lacks the attribute.
    """
    module_name, _, attribute = target.partition(":")
    found = isolated(f"importing {module_name}", lambda: importlib.import_module(module_name))
    absent = object()
    for part in attribute.split("."):
        # a module may compute its attributes when they are asked for
        found = isolated(f"reading {target}", functools.partial(getattr, found, part, absent))
        if found is absent:
            raise PluginFailure(f"{module_name} has no attribute {attribute!r}")
    return found


def instantiate(target: Any, name: str) -> Any:
    """``target`` itself, or an instance when it is a class.

    Raises:
        PluginFailure: the constructor raised.
    """
    return isolated(f"making {name}", target) if isinstance(target, type) else target
