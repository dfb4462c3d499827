"""The reference against the code: hooks, report fields, exit codes."""

from __future__ import annotations

import ast
import inspect
import json
import re
from typing import Any

import attrs
import pages
import pytest

import eulerforge.errors
from eulerforge.api import HOOK_NAMES, InjectionReport, SiteReport, hooks
from eulerforge.cli.main import main
from eulerforge.errors import EulerForgeError, Problem

REFERENCE = pages.ROOT / "docs" / "reference"


def hooks_page() -> str:
    text: str = pages.generator().hooks_page()
    return text


@pytest.mark.parametrize("name", HOOK_NAMES)
def test_a_hooks_signature_is_the_codes(name: str):
    section = hooks_page().split(f"\n## {name}\n")[1].split("\n## ")[0]
    (source,) = re.findall(r"```python\n(.*?)\n```", section, re.DOTALL)
    shown = ast.parse(source + ": ...").body[0]
    assert isinstance(shown, ast.FunctionDef)
    signature = inspect.signature(getattr(hooks, name))
    assert shown.name == name
    assert [argument.arg for argument in shown.args.args] == list(signature.parameters)
    assert [ast.unparse(argument.annotation) for argument in shown.args.args if argument.annotation] == [
        parameter.annotation for parameter in signature.parameters.values()
    ]
    assert shown.returns is not None
    assert ast.unparse(shown.returns) == signature.return_annotation
    assert inspect.getdoc(getattr(hooks, name)) in section


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.page_name)
def test_a_page_implements_hooks_that_exist(page: Any):
    for block in pages.blocks(page):
        if block.language == "python" and "@hookimpl" in block.text:
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.FunctionDef) and any(
                    isinstance(decorator, ast.Name) and decorator.id == "hookimpl" for decorator in node.decorator_list
                ):
                    parameters = inspect.signature(getattr(hooks, node.name)).parameters
                    assert [argument.arg for argument in node.args.args] == list(parameters)


def fields_of_table(page: str, heading: str) -> set[str]:
    section = (REFERENCE / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize("kind", [InjectionReport, SiteReport])
def test_the_report_page_names_every_field(kind: type):
    names = {field.name for field in attrs.fields(kind)}
    assert fields_of_table("injection_report.md", kind.__name__) == names


def test_the_envelope_page_names_every_field_of_a_problem():
    names = {field.name for field in attrs.fields(Problem)}
    assert fields_of_table("exit_codes_and_json.md", "The envelope") == names


def test_the_exit_code_table_is_the_codes():
    text = (REFERENCE / "exit_codes_and_json.md").read_text(encoding="utf-8")
    shown = {int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE) for code in cell.split(",")}
    classes = [value for value in vars(eulerforge.errors).values() if isinstance(value, type)]
    codes = {kind.exit_code for kind in classes if issubclass(kind, EulerForgeError)}
    assert shown == codes | {0, 129, 130, 143}


def test_the_envelopes_shown_are_what_is_printed(capsys: pytest.CaptureFixture[str]):
    shown = [
        json.loads(block.text)
        for block in pages.blocks(REFERENCE / "exit_codes_and_json.md")
        if block.language == "json"
    ]
    validate = ["train", "--preset", "quickstart", "--validate-only", "--json"]
    assert main(validate) == 0
    good = json.loads(capsys.readouterr().out)
    assert main([*validate, "--set", "training.lrr=1"]) == 2
    bad = json.loads(capsys.readouterr().out)
    assert [good, bad] == shown


@pytest.mark.parametrize(
    ("command", "row"),
    [
        (("train", "--preset", "quickstart", "--print-config"), "train --print-config"),
        (("plugins", "list"), "plugins list"),
        (("plugins", "check", "dense_lora"), "plugins check"),
        (("presets", "list"), "presets list"),
        (("presets", "show", "quickstart"), "presets show"),
    ],
)
def test_data_has_the_fields_of_the_table(command: tuple[str, ...], row: str, capsys: pytest.CaptureFixture[str]):
    text = (REFERENCE / "exit_codes_and_json.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("|") and f"`{row}`" in line.split("|")[1]]
    fields = re.findall(r"`(\w+)`", line.split("|")[2].partition(";")[0])
    assert main([*command, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["data"]) == fields
