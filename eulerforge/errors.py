"""Every error that a user may see: one line that says what and where, one hint that says how to mend it.

The exit codes are part of the command line's contract:
0 done, 1 the run failed, 2 usage, preset or data is wrong, 3 a plugin is missing, broken, incompatible or in conflict,
4 no suitable device, 129 / 130 / 143 stopped by SIGHUP / SIGINT / SIGTERM.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

import attrs

from eulerforge.terminal import one_line

LONGEST_LINE = 2000
"""Characters of a printed line; what quotes a preset or a row may be as long as the file."""


@attrs.frozen(kw_only=True)
class Problem:
    """One thing that is wrong, with all that is known about where it is.

    ``key`` is a dotted path (``training.lr``), ``source`` is ``file:line`` or ``--set``.
    """

    message: str
    hint: str | None = None
    key: str | None = None
    source: str | None = None

    def to_json(self) -> dict[str, str]:
        return {name: value for name, value in attrs.asdict(self).items() if value is not None}

    def lines(self, label: str = "error") -> list[str]:
        """The problem as the command line prints it: ``error: source: key: message`` and ``hint: ...``.

        Each is one line without control characters, whatever the message quotes.
        """
        where = ": ".join(part for part in (self.source, self.key) if part)
        first = f"{label}: {where}: {self.message}" if where else f"{label}: {self.message}"
        return [one_line(line, LONGEST_LINE) for line in [first, *([f"hint: {self.hint}"] if self.hint else [])]]


class EulerForgeError(Exception):
    """Base of all errors that are shown without a traceback."""

    exit_code = 1

    def __init__(
        self, message: str, *, hint: str | None = None, key: str | None = None, source: str | None = None
    ) -> None:
        super().__init__(message)
        self.problems: tuple[Problem, ...] = (Problem(message=message, hint=hint, key=key, source=source),)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> EulerForgeError:
        """An error that carries several problems, shown all at once."""
        first = problems[0]
        error = cls(first.message, hint=first.hint, key=first.key, source=first.source)
        error.problems = tuple(problems)
        return error


class RunError(EulerForgeError):
    """The run failed after a valid start (exit 1)."""


class UsageError(EulerForgeError):
    """The command, the preset or a path on it is wrong (exit 2)."""

    exit_code = 2


class ConfigError(UsageError):
    """The preset is wrong."""


class DataError(UsageError):
    """A data file or a row of it is wrong."""


class ModelError(UsageError):
    """The model folder or its fit to the preset is wrong."""


class CheckpointError(UsageError):
    """A checkpoint or run folder is damaged, absent, or does not fit the preset."""


class PluginError(EulerForgeError):
    """A plugin is missing, broken, incompatible or in conflict (exit 3)."""

    exit_code = 3


class DeviceError(EulerForgeError):
    """No suitable device (exit 4)."""

    exit_code = 4


class Stopped(EulerForgeError):
    """Stopped by a signal (exit 128 + signal number); the message says what is saved."""

    def __init__(self, message: str, *, signal_number: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signal_number


class Interrupted(KeyboardInterrupt):
    """A signal came where nothing waits for one; no ``except Exception`` on the way may keep it."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number


def as_stopped(interrupt: KeyboardInterrupt, what: str, hint: str) -> Stopped:
    """The error for an interrupt; ``what`` follows the signal's name and says what is saved."""
    number = interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT
    name = signal.Signals(number).name
    return Stopped(f"stopped by {name} {what}".rstrip(), signal_number=number, hint=hint)


def first_line(error: BaseException, otherwise: str | None = None) -> str:
    """The first line of what an error says; ``otherwise``, or its type's name, when it says nothing."""
    return (str(error).strip() or otherwise or type(error).__name__).splitlines()[0]
