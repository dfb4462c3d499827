"""Write the reference pages that must not drift from the code: commands, preset keys, hooks."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import attrs

from eulerforge.api import hooks
from eulerforge.api.settings import setting_info
from eulerforge.config.schema import PhaseConfig, RunConfig


def write_all(folder: Path) -> None:
    """Write every generated page into ``folder``; a page that did not change keeps its time stamp."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"cli.md": cli_page(), "preset.md": preset_page(), "hooks.md": hooks_page()}
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def cli_page() -> str:
    """The help text of every command, as argparse prints it."""
    from eulerforge.cli.main import COMMANDS, command_parser, main_parser

    parts = ["# Command line\n", _block(main_parser().format_help())]
    for name in COMMANDS:
        parser = command_parser(name)
        parts += [f"\n## eulerforge {name}\n", _block(parser.format_help())]
        for sub_name, sub_parser in _subcommands(parser):
            parts += [f"\n### eulerforge {name} {sub_name}\n", _block(sub_parser.format_help())]
    return "\n".join(parts) + "\n"


def _subcommands(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return sorted(action.choices.items())
    return []


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


def preset_page() -> str:
    """Every key of a preset with its type, default and help, the keys of each installed strategy included."""
    from eulerforge.plugins import load_registry

    lines = [
        "# Preset keys\n",
        "Every key may be set in a TOML or YAML preset and with `--set KEY=VALUE`.\n",
        "## Core keys\n",
        *_table(RunConfig, ""),
        "\n## Keys of each of `training.phases`\n",
        *_table(PhaseConfig, "training.phases[]."),
    ]
    registry = load_registry()
    for record in registry.records:
        for offer in record.offers:
            if offer.kind == "strategy":
                lines += [
                    f'\n## Keys of `injection` with `strategy = "{offer.name}"`\n',
                    *_table(registry.strategy_config(offer.name), "injection."),
                ]
    return "\n".join(lines) + "\n"


def _table(config_class: type, prefix: str) -> list[str]:
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    rows += [
        f"| `{key}` | {kind} | {default} | {text} |" for key, kind, default, text in setting_rows(config_class, prefix)
    ]
    return rows


def setting_rows(config_class: type, prefix: str) -> list[tuple[str, str, str, str]]:
    """(key, type, default, help) of every leaf key below a config class."""
    attrs.resolve_types(config_class)
    rows: list[tuple[str, str, str, str]] = []
    for attribute in attrs.fields(config_class):
        if prefix == "" and attribute.name == "injection":
            continue
        if attribute.name == "strategy" and prefix == "":
            # the reader moves injection.strategy to the top; a preset writes it where it belongs
            rows.append(("injection.strategy", "str", _default(attribute), "Injection strategy, a plugin's"))
            continue
        if attrs.has(attribute.type):
            rows += setting_rows(attribute.type, f"{prefix}{attribute.name}.")
            continue
        info = setting_info(attribute)
        meaning = info.help + (f" ({', '.join(map(str, info.choices))})" if info.choices else "")
        rows.append(
            (f"{prefix}{attribute.name}", type_name(attribute.type), _default(attribute), meaning.replace("|", "\\|"))
        )
    return rows


def type_name(kind: Any) -> str:
    """A key's type in words of a preset: ``list of str`` for ``tuple[str, ...]``."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is tuple:
        return f"list of {type_name(inside[0])}"
    if origin is Mapping:
        return f"table of {type_name(inside[1])}"
    if inside:
        return " or ".join(type_name(part) for part in inside)
    return {type(None): "none", PhaseConfig: "phases"}.get(kind, kind.__name__)


def _default(attribute: attrs.Attribute[Any]) -> str:
    value = attribute.default
    if value is attrs.NOTHING:
        return "**required**"
    if isinstance(value, attrs.Factory):  # type: ignore[arg-type]
        value = value.factory()
    return "`[]`" if value == () else f"`{value}`"


def hooks_page() -> str:
    """Each hook's signature and docstring."""
    lines = ["# Hooks\n", "Import `hookimpl` from `eulerforge.api` and decorate functions of these names.\n"]
    for name in hooks.HOOK_NAMES:
        function = getattr(hooks, name)
        signature = str(inspect.signature(function)).replace("'", "")  # annotations are kept as texts
        lines += [
            f"## {name}\n",
            f"```python\ndef {name}{signature}\n```\n",
            f"{inspect.getdoc(function)}\n",
        ]
    return "\n".join(lines) + "\n"
