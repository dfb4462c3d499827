"""``plugins new``: what it writes passes the kit, and the kit names the bugs that are planted in it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
from sourceshelf import SourceShelf

from eulerforge.cli.main import main

OLMO2 = Path(__file__).parents[1] / "thirdparty" / "eulerforge-backbone-olmo2"
DEMO = OLMO2.parent / "eulerforge-demo"


def new(folder: Path, *words: str) -> Path:
    assert main(["plugins", "new", *words, "--output", str(folder)]) == 0
    (made,) = [path for path in folder.iterdir() if path.name.startswith("eulerforge-") and words[0] in path.name]
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceShelf, dict[str, Path]]:
    """One distribution of each kind, and the shelf on which they lie."""
    folder = tmp_path_factory.mktemp("new")
    shelf = SourceShelf(folder / "shelf")
    kinds = {"backbone": "acmeback", "strategy": "acmescale", "phases": "acmenorms"}
    return shelf, {kind: shelf.add(new(folder, name, "--kind", kind)) for kind, name in kinds.items()}


def test_the_tests_of_every_kind_pass_at_once(made: tuple[SourceShelf, dict[str, Path]]) -> None:
    shelf, sources = made
    results = shelf.run_tests(*sources.values())
    assert {name: {test for test, fault in tests.items() if fault} for name, tests in results.items()} == {
        source.name: set() for source in sources.values()
    }
    counts = {kind: len(results[source.name]) for kind, source in sources.items()}
    assert counts["backbone"] > 25
    assert counts["strategy"] > 20
    assert counts["phases"] > 12


def test_the_registry_finds_them(made: tuple[SourceShelf, dict[str, Path]]) -> None:
    shelf, sources = made
    done = shelf.python("-m", "eulerforge", "plugins", "list", "--json")
    rows = {row["distribution"]: row for row in json.loads(done.stdout)["data"]["plugins"]}
    for source in sources.values():
        assert rows[source.name]["status"] == "ok", rows[source.name]
        assert len(rows[source.name]["offers"]) == 1


def test_what_is_written_is_clean(made: tuple[SourceShelf, dict[str, Path]]) -> None:
    for source in made[1].values():
        for words in (("check", "--select", "E,F,W,I,B,UP,RUF"), ("format", "--check")):
            command = [sys.executable, "-m", "ruff", words[0], "--isolated", "--line-length", "120", *words[1:], "."]
            done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        text = (source / "README.md").read_text(encoding="utf-8")
        assert "$package" not in text
        assert (source / "src" / source.name.replace("-", "_") / "py.typed").exists()


@attrs.frozen
class Bug:
    """In ``file``, the text ``old`` becomes ``new``; ``said`` is a pattern of the message that names it."""

    file: str
    old: str
    new: str
    said: str


ADAPTER, PLUGIN, CLASS_END = "adapter.py", "plugin.py", '        "down_proj": ("ffn.down",),\n    }\n'


def method(head: str, body: str) -> str:
    """The end of the adapter's class with one more method."""
    return f"{CLASS_END}\n    def {head}\n        {body}\n"


BUGS = {
    "layers": Bug(
        ADAPTER,
        CLASS_END,
        method("find_transformer_layers(self, model):", "return list(model.get_decoder().layers)[1:]"),
        r"the adapter's find_transformer_layers gives 2 of 3 layers: give every decoder layer",
    ),
    "order": Bug(
        ADAPTER,
        CLASS_END,
        method("find_transformer_layers(self, model):", "return list(model.get_decoder().layers)[::-1]"),
        r"find_transformer_layers gives the layers in the order model\.layers\.2, model\.layers\.1, model\.layers\.0",
    ),
    "path": Bug(
        ADAPTER,
        '"mlp.gate_proj": "ffn.gate"',
        '"mlp.gate_prj": "ffn.gate"',
        r"no layer has a place of the role ffn\.gate .* its path mlp\.gate_prj is in no layer "
        r"\(nearest is mlp\.gate_proj",
    ),
    "strange": Bug(
        ADAPTER,
        CLASS_END,
        method("find_sites(self, layer):", "from eulerforge.api import Site; return [Site('mlp.gate', 'ffn.gate')]"),
        r"the site path mlp\.gate is no module of layer 0 \(nearest is mlp\.gate_proj\)",
    ),
    "role": Bug(
        ADAPTER,
        '"mlp.down_proj": "ffn.down"',
        '"mlp.down_proj": "ffn.up"',
        r"the site mlp\.down_proj has the role ffn\.up, but its name says down: correct the role",
    ),
    "spelling": Bug(
        ADAPTER,
        '"self_attn.q_proj": "attn.q"',
        '"self_attn.q_proj": "atn.q"',
        r"the site self_attn\.q_proj has the role atn\.q, which the spec does not list \(nearest is attn\.q\)",
    ),
    "keyword": Bug(
        ADAPTER,
        '"gate_proj": ("ffn.gate",)',
        '"gate_proj": ("ffn.gaet",)',
        r"the keyword gate_proj means the role ffn\.gaet, which no place has \(nearest is ffn\.gate\)",
    ),
    "nothing": Bug(
        ADAPTER,
        '"down_proj": ("ffn.down",),\n    }',
        '"down_proj": ("ffn.down",),\n        "w2": (),\n    }',
        r"the keyword w2 reaches nothing in any model",
    ),
    "crossed": Bug(
        ADAPTER,
        '"up_proj": ("ffn.up",)',
        '"up_proj": ("ffn.down",)',
        r"the keyword up_proj means the role ffn\.down, but its name says up",
    ),
    "routers": Bug(
        ADAPTER,
        CLASS_END,
        method("find_routers(self, layer):", 'return ("mlp.gate.weight",)'),
        r"find_routers names mlp\.gate\.weight, no parameter of layer 0 \(nearest is mlp\.gate_proj\.weight\)",
    ),
    "wrapped": Bug(
        ADAPTER,
        CLASS_END,
        method(
            "find_sites(self, layer):",
            "return [site for site in super().find_sites(layer)"
            " if not hasattr(layer.get_submodule(site.path), 'base_layer')]",
        ),
        r"find_sites of a layer with adapters loses self_attn\.q_proj, .* look through a wrapper",
    ),
    "heavy": Bug(
        PLUGIN,
        "from eulerforge.api",
        "import torch  # noqa\nfrom eulerforge.api",
        r"light import .* imports torch.*: import heavy modules in the module of the target",
    ),
    "api": Bug(
        PLUGIN,
        'EULERFORGE_API = "1.0"',
        'EULERFORGE_API = "2.0"',
        r"it was written for API 2\.0, this core has API 1\.0: upgrade eulerforge-core",
    ),
    "modeltype": Bug(
        PLUGIN,
        'model_types=("olmo2",)',
        'model_types=("olmo",)',
        r"model_types of the spec lacks olmo2, so backbone = auto does not find",
    ),
    "signature": Bug(
        ADAPTER,
        CLASS_END,
        method("roles_of(self):", "return ()"),
        r"protocol .* roles_of\(\) cannot be called as roles_of\(keyword\)",
    ),
    "mixers": Bug(
        PLUGIN,
        'isolation="attention"',
        'isolation="gather"',
        r"isolation = 'gather' of the spec is refused, .* has no find_sequence_mixers",
    ),
    "entry": Bug("pyproject.toml", '.plugin"\n', '.plugn"\n', r"no installed distribution has \S+\.plugin as an entry"),
}


def copied(folder: Path, bug: str) -> Path:
    """A copy of the OLMo2 distribution under names of its own, so that many can lie on one shelf."""
    source = folder / f"eulerforge-backbone-olmo2{bug}"
    shutil.copytree(OLMO2, source, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "src" / "eulerforge_backbone_olmo2").rename(source / "src" / f"eulerforge_backbone_olmo2{bug}")
    for path in [*source.rglob("*.py"), source / "pyproject.toml"]:
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"eulerforge([-_])backbone([-_])olmo2", rf"eulerforge\1backbone\2olmo2{bug}", text)
        text = text.replace('name="olmo2"', f'name="olmo2{bug}"').replace(
            'backbone = "olmo2"', f'backbone = "olmo2{bug}"'
        )
        path.write_text(text.replace('"olmo2" =', f'"olmo2{bug}" ='), encoding="utf-8")
    return source


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The kit's verdict on OLMo2's backbone (``""``), on each copy with one bug, and on the demo distribution."""
    folder = tmp_path_factory.mktemp("bugs")
    shelf = SourceShelf(folder / "shelf")
    sources = {"": shelf.add(copied(folder, ""))}
    for name, bug in BUGS.items():
        source = copied(folder, name)
        (file,) = source.rglob(bug.file)
        text = file.read_text(encoding="utf-8")
        assert text.count(bug.old) == 1, (name, text)
        file.write_text(text.replace(bug.old, bug.new), encoding="utf-8")
        sources[name] = shelf.add(source)
    sources["demo"] = shelf.add(Path(shutil.copytree(DEMO, folder / DEMO.name)))
    results = shelf.run_tests(*sources.values())
    return {name: results[source.name] for name, source in sources.items()}


def test_a_family_that_we_do_not_ship_passes_with_under_80_lines(verdicts: dict[str, dict[str, str]]) -> None:
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in OLMO2.rglob("*.py"))
    assert lines < 80
    assert len(verdicts[""]) > 25
    assert {test: fault for test, fault in verdicts[""].items() if fault} == {}


def test_a_distribution_with_all_three_kinds_passes(verdicts: dict[str, dict[str, str]]) -> None:
    assert len(verdicts["demo"]) > 45
    assert {test: fault for test, fault in verdicts["demo"].items() if fault} == {}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_named(name: str, verdicts: dict[str, dict[str, str]]) -> None:
    messages = [" ".join(fault.split()) for fault in verdicts[name].values() if fault]
    assert any(re.search(BUGS[name].said, message) for message in messages), "\n".join(messages)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["plugins", "new", *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err.splitlines()


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "a\\b", "..", "", "-x", "Big", "a..b", "4chan", "end-", "a b", "a\n", "x" * 61, "é"]
)
def test_a_name_that_is_none_writes_nothing(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--kind=phases", f"--output={tmp_path}", "--", name]
    (first, hint) = refused(capsys, *words)
    assert first == f"error: {name!r} is no name for a plugin"
    assert hint.startswith("hint: lower-case letters")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("x", "--kind", "bakbone"), "there is no kind 'bakbone'", "did you mean --kind backbone?"),
        (
            ("x", "--kind", "backbone", "--model-type", "lama"),
            "the installed transformers has no model_type 'lama'",
            "did you mean --model-type llama?",
        ),
        (("x", "--kind", "phases", "--model-type", "llama"), "--model-type belongs to --kind backbone", "leave it out"),
        (
            ("llama3", "--kind", "backbone"),
            "the name 'llama3' is taken by eulerforge-backbone-llama3:llama3",
            "of two plugins with one name neither wins: choose another",
        ),
        (
            ("base-ffn", "--kind", "phases"),
            "the name 'base-ffn' is taken by eulerforge-phases:phases",
            "of two plugins with one name neither wins: choose another",
        ),
    ],
)
def test_what_is_refused(
    words: tuple[str, ...], message: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, *words, "--output", str(tmp_path)) == [f"error: {message}", f"hint: {hint}"]
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "eulerforge-phases-mine"
    there.symlink_to(tmp_path / "nowhere")
    (first, _) = refused(capsys, "mine", "--kind", "phases", "--output", str(tmp_path))
    assert first == f"error: {there} exists already, and nothing is overwritten"
    assert there.is_symlink()
    (tmp_path / "file").write_text("")
    (first, _) = refused(capsys, "mine", "--kind", "phases", "--output", str(tmp_path / "file"))
    assert first == f"error: {tmp_path / 'file'} is no folder"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eulerforge-phases-mine", "file"]


def test_json_says_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "new", "my.scale", "--kind", "strategy", "--output", str(tmp_path), "--json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)["data"]
    folder = tmp_path / "eulerforge-strategy-my-scale"
    assert (data["distribution"], data["package"]) == (folder.name, "eulerforge_strategy_my_scale")
    assert data["folder"] == str(folder)
    assert data["files"] == sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert data["next"][1:] == ["pip install -e '.[test]'", "python -m pytest"]


def test_a_family_that_is_covered_already_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new(tmp_path, "mine", "--kind", "backbone")
    assert "backbone llama3 covers model_type 'llama' too" in capsys.readouterr().err
