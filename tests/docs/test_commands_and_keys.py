"""What the documents tell people to type exists: commands, make targets, preset keys, files."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
import pytest

from eulerforge.cli.main import COMMANDS, command_parser
from eulerforge.config.schema import PhaseConfig, RunConfig
from eulerforge.plugins import load_registry

ALL_PAGES = pytest.mark.parametrize("page", pages.PAGES, ids=pages.page_name)
SECTIONS = ("model", "injection", "data", "training", "checkpoint", "evaluation")
# a TOML block that is no preset begins with one of these tables
OTHER_TOML = {"build-system", "project", "tool"}


@pytest.fixture(scope="module")
def generate() -> Any:
    return pages.generator()


@pytest.fixture(scope="module")
def known(generate: Any) -> set[str]:
    strategy = load_registry().strategy_config("dense_lora")
    rows = [
        *generate.setting_rows(RunConfig, ""),
        *generate.setting_rows(strategy, "injection."),
        *generate.setting_rows(PhaseConfig, "training.phases[]."),
    ]
    # `init` is the key of the strategy that the plugin page makes
    return {row[0] for row in rows} | {"injection.init"}


def exists(key: str, known: set[str]) -> bool:
    """A key, a section of keys, or a key below a free table such as data.schema."""
    return key in known or any(name.startswith(f"{key}.") for name in known) or key.startswith("data.schema.")


def leaves(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, below in value.items():
            yield from leaves(below, f"{prefix}.{name}" if prefix else name)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for below in value:
            yield from leaves(below, f"{prefix}[]")
    else:
        yield prefix


def keys_of(page: Path) -> set[str]:
    """Every preset key that the page writes: in TOML blocks, after --set, and as inline code."""
    keys: set[str] = set()
    for block in pages.blocks(page):
        if block.language == "toml":
            table = tomllib.loads(block.text)
            if not OTHER_TOML & set(table):
                keys |= set(leaves(table))
    for words in pages.commands(page):
        keys |= {words[index + 1].partition("=")[0] for index, word in enumerate(words) if word == "--set"}
    inline = rf"`((?:{'|'.join(SECTIONS)})\.[a-z_.]+)[^`]*`"
    files = (".py", ".toml", ".json", ".jsonl", ".yml", ".safetensors")
    keys |= {key for key in re.findall(inline, pages.prose(page)) if not key.endswith(files)}
    return keys


@ALL_PAGES
def test_every_command_parses(page: Path):
    targets = set(re.findall(r"^(\w+):", (pages.ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in pages.commands(page):
        if words[0] == "make":
            assert set(words[1:]) <= targets, words
        elif words[0] == "eulerforge":
            assert words[1] in COMMANDS, words
            command_parser(words[1]).parse_args(words[2:])
        else:
            assert words[0] in {"source", "pip", "cd", "python"}, f"a command that this test does not know: {words}"


# the tutorial shows what a misspelt key does
MISSPELT = {"training.max_train_step"}


@ALL_PAGES
def test_every_preset_key_exists(page: Path, known: set[str]):
    assert {key for key in keys_of(page) if not exists(key, known)} <= MISSPELT


def test_the_tutorials_misspelt_key_gets_the_answer_that_it_shows(capsys: pytest.CaptureFixture[str]):
    from eulerforge.cli.main import main

    page = pages.ROOT / "docs" / "tutorials" / "first_fine_tune.md"
    block = next(block.text for block in pages.blocks(page) if "max_train_step=50" in block.text)
    shown = block.splitlines()[1:]
    assert main(["train", "--preset", "quickstart", "--validate-only", "--set", "training.max_train_step=50"]) == 2
    assert capsys.readouterr().err.splitlines() == shown


def test_the_preset_of_the_readme_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from eulerforge.cli.main import main

    monkeypatch.chdir(tmp_path)
    (text,) = (block.text for block in pages.blocks(pages.README) if block.language == "toml")
    assert len(text.splitlines()) == 5
    (tmp_path / "my.toml").write_text(text)
    rows = [block.text for block in pages.blocks(pages.README) if block.language == "json"]
    (tmp_path / "my-rows.jsonl").write_text(rows[0])
    assert main(["train", "--preset", "my.toml", "--validate-only"]) == 0


@ALL_PAGES
def test_links_and_named_files_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        path = page.parent / target
        # generated pages are there once the documents are built
        assert path.exists() or "generated" in path.parts, target
    for name in re.findall(r"`((?:docs|tests|plugins|presets|eulerforge)/[\w./-]+)`", text):
        assert (pages.ROOT / name).exists() or name == "docs/_build/html", name


@ALL_PAGES
def test_no_path_of_one_machine_and_no_registry(page: Path):
    assert not re.search(r"/(?:work|tmp|home|root)/|https?://[^ ]*pypi", page.read_text(encoding="utf-8"))


def test_the_generated_pages_name_every_command_and_key(generate: Any, known: set[str]):
    text = generate.cli_page()
    assert all(f"\n## eulerforge {name}\n" in text for name in COMMANDS)
    page = generate.preset_page()
    assert all(f"| `{key}` |" in page for key in known - {"injection.init"})
    assert "tuple" not in page
