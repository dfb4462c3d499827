"""The plugin page's blocks make two real distributions: built, found by entry point, checked and trained with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import attrs
import pages
import pytest
import tiny

PAGE = pages.ROOT / "docs" / "howto" / "write_a_plugin.md"
DISTRIBUTIONS = ("eulerforge-backbone-acme", "eulerforge-strategy-acme")
ADAPTER_SCRIPT = """
from torch import nn
from eulerforge.plugins import load_registry

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("wq", "wv")})
        self.feed_forward = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("w1", "w2", "w3")})

registry = load_registry()
adapter = registry.create(registry.backbone("acme"))
sites = {site.role: site.path for site in adapter.find_sites(Layer())}
print(sites[adapter.roles_of("gate_proj")[0]], sites[adapter.roles_of("down_proj")[0]], sites["attn.q"])
"""


@attrs.frozen
class Shelf:
    """A folder on the module path where the two wheels lie unpacked, as an installer leaves them."""

    folder: Path

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(self.folder), *filter(None, sys.path)])
        environ = {**os.environ, "PYTHONPATH": path}
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environ, check=False)

    def data(self, *arguments: str) -> Any:
        done = self.python("-m", "eulerforge", *arguments, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)["data"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    folder = tmp_path_factory.mktemp("page")
    for block in pages.blocks(PAGE):
        if block.file:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
    shelf = folder / "shelf"
    for name in DISTRIBUTIONS:
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "wheels" / name)]
        done = subprocess.run(command, cwd=folder / name, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (wheel,) = (folder / "wheels" / name).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(shelf)
    return Shelf(shelf)


def test_both_are_listed_and_pass_the_check(shelf: Shelf):
    rows = {row["name"]: row for row in shelf.data("plugins", "list")["plugins"]}
    assert [rows[name]["status"] for name in ("acme", "acme_scale")] == ["ok", "ok"]
    assert {rows[name]["distribution"] for name in ("acme", "acme_scale")} == set(DISTRIBUTIONS)
    for name in ("acme", "acme_scale"):
        assert shelf.data("plugins", "check", name)["passed"]


def test_the_adapter_reaches_what_the_page_says(shelf: Shelf):
    done = shelf.python("-c", ADAPTER_SCRIPT)
    assert done.stdout.split() == ["feed_forward.w1", "feed_forward.w2", "attention.wq"], done.stderr


def test_the_strategy_trains_and_merges(shelf: Shelf, tmp_path: Path):
    model = tiny.save_tiny(tmp_path / "tiny")
    rows = tiny.write_rows(tmp_path / "rows.jsonl")
    (preset,) = (block.text for block in pages.blocks(PAGE) if 'strategy = "acme_scale"' in block.text)
    head = f'model_name = "{model}"\nbackbone = "llama3"\ndevice = "cpu"\n'
    training = "[training]\nmax_train_steps = 2\nbatch_size = 2\nlr = 0.1\n"
    (tmp_path / "my.toml").write_text(f'{head}{preset}[data]\npath = "{rows}"\n{training}')
    run = tmp_path / "run"
    assert shelf.data("train", "--preset", str(tmp_path / "my.toml"), "--output-dir", str(run))["steps"] == 2
    written = shelf.data("merge", str(run))
    assert written["tensors"] == len(json.loads((run / "final" / "manifest.json").read_text())["injection"]["sites"])
