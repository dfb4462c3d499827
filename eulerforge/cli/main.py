"""The command ``eulerforge``: one lazy module per command, and one place where errors become lines and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from eulerforge import __version__
from eulerforge.cli.stops import stops_raise
from eulerforge.errors import EulerForgeError, PluginError, Problem, UsageError, as_stopped, first_line

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train_command", "fine-tune a model from a preset"),
    "bench": ("bench_command", "merge a run and measure it on held-out rows"),
    "replay": ("replay_command", "train some steps of a run again and compare every number"),
    "merge": ("merge_command", "write a run's merged model as a Hugging Face folder"),
    "export": ("export_command", "write a run as a merged model or a PEFT adapter"),
    "data": ("data_command", "look at the rows as the model will see them"),
    "plugins": ("plugins_command", "list, show and check plugins"),
    "presets": ("presets_command", "list and show presets"),
    "env": ("env_command", "versions and folders, for a bug report"),
}

AGAIN = "nothing is left half written: the same command starts anew"


class Parser(argparse.ArgumentParser):
    """argparse, with usage errors in our own form."""

    given: Sequence[str] = ()
    """The words that are parsed, for the hint of an error."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=self._way_out(message))

    def _way_out(self, message: str) -> str:
        _, unknown, words = message.partition("unrecognized arguments: ")
        whole = words.partition(" ")[0]
        word = whole.partition("=")[0]
        if unknown and self.prog == "eulerforge":
            return f"options come after the command: eulerforge COMMAND {word}"
        if unknown and self.prog in ("eulerforge train", "eulerforge data") and (setting := self._setting(whole)):
            return f"did you mean --set {setting}?"
        if unknown and not word.startswith("-") and self.prog == "eulerforge train":
            return f"did you mean --preset {word}?"
        options = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(word, options, n=1, cutoff=0.75) if unknown else ()
        return f"did you mean {near[0]}?" if near else f"{self.prog} --help"

    def _setting(self, word: str) -> str | None:
        """KEY=VALUE, where a stray word is a part of it: after ``--set KEY``, or without ``--set`` before it."""
        at = self.given.index(word) if word in self.given else 0
        before = self.given[max(at - 2, 0) : at]
        if before and "--set" in (before[0], before[-1].partition("=")[0]):
            key = before[-1].removeprefix("--set=")
            if key != "--set" and "=" not in key:
                value = word.removeprefix("=") or "".join(self.given[at + 1 : at + 2])
                return f"{key}={value}"
        return word if "=" in word and not word.startswith("-") else None


def main_parser() -> argparse.ArgumentParser:
    """The parser of ``eulerforge`` itself; it imports no command."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = Parser(
        prog="eulerforge",
        description="LoRA fine-tuning of language models through plugins.",
        epilog=f"commands:\n{listing}\n\n'eulerforge COMMAND --help' explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"eulerforge {__version__}")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help="what to do")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="the command's own arguments")
    return parser


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command; its module is imported here."""
    parser = Parser(prog=f"eulerforge {name}", description=COMMANDS[name][1].capitalize() + ".", allow_abbrev=False)
    command_module(name).add_arguments(parser)
    return parser


def command_module(name: str) -> Any:
    return importlib.import_module(f"eulerforge.cli.{COMMANDS[name][0]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give back its exit code; every error is printed here."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json, debug = "--json" in arguments, "--debug" in arguments
    try:
        with stops_raise():
            code = _dispatch(arguments)
            sys.stdout.flush()  # here, where a reader that went away is no error, and not at the interpreter's end
        return code
    except EulerForgeError as error:
        if debug:
            _traceback()
        _print_problems(error.problems, as_json)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        stopped = as_stopped(interrupt, "", AGAIN)
        _print_problems(stopped.problems, as_json)
        return stopped.exit_code
    except BrokenPipeError:
        # the reader of our output went away, as `| head` does; keep the interpreter's last flush quiet
        from eulerforge.cli.streams import lead_nowhere

        lead_nowhere(sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the last line of defence: one line, never a bare traceback
        if debug:
            _traceback()
        from eulerforge.cli.machine import machine_problem

        _print_problems([machine_problem(error) or _fault(error)], as_json)
        return 1


def _fault(error: Exception) -> Problem:
    hint = "--debug shows the traceback; this is a fault of EulerForge or of a plugin, please report it"
    return Problem(message=f"{type(error).__name__}: {first_line(error, 'no message')}", hint=hint)


def _dispatch(arguments: list[str]) -> int:
    first = main_parser().parse_args(arguments)
    if first.command is None:
        main_parser().print_help()
        return UsageError.exit_code
    if first.command not in COMMANDS:
        near = difflib.get_close_matches(first.command, COMMANDS, n=1)
        raise UsageError(
            f"there is no command {first.command!r}",
            hint=f"did you mean eulerforge {near[0]}?" if near else "eulerforge --help lists the commands",
        )
    args = command_parser(first.command).parse_args(first.arguments)
    try:
        code: int = command_module(first.command).run(args)
    except SystemExit as error:  # nothing of ours leaves so: a plugin's exit(0) would pass for a run that is done
        raise PluginError(
            f"something called sys.exit({error.code!r}) in the midst of {first.command}",
            hint="a plugin or a model's own code did it: --no-plugin switches one off, --debug shows the traceback",
        ) from error
    return code


def _print_problems(problems: Sequence[Problem], as_json: bool) -> None:
    from eulerforge.cli.output import emit_json_problems, say

    with contextlib.suppress(OSError, ValueError):  # nobody listens; the exit code still says it
        if as_json:
            emit_json_problems(problems)
            sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        for problem in problems:
            for line in problem.lines():
                say(line)


def _traceback() -> None:
    import traceback

    from eulerforge.cli.output import say

    say(traceback.format_exc().rstrip())


def entry() -> NoReturn:
    """The console script."""
    from eulerforge.cli.streams import Unbreakable, open_standard_streams

    open_standard_streams()
    # a reader of stderr that goes away ends no command; one of stdout does (see ``main``)
    sys.stderr = Unbreakable(sys.stderr)  # type: ignore[assignment]
    sys.exit(main())
