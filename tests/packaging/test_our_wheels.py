"""Our own distributions: each is built, complete, named where it must be, and installed one by one."""

from __future__ import annotations

import re
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import attrs
import pytest
from freshvenv import Venv, build, make_venv

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).parents[2]
PLUGINS = {path.parent.name: path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))}
SOURCES = {"eulerforge-core": ROOT, **PLUGINS}
LIGHT_EXTRAS = {"plugins", "all"}  # extras that name only our own distributions


@attrs.frozen
class Built:
    """Wheel and source distribution of every folder, by distribution name."""

    wheels: dict[str, Path]
    sdists: dict[str, Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    wheels, sdists = {}, {}
    for name, source in SOURCES.items():
        sdists[name], wheels[name] = sorted(
            build(source, folder / name, "sdist", "wheel"), key=lambda path: path.suffix == ".whl"
        )
    return Built(wheels, sdists)


@pytest.fixture(scope="module")
def venv(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Venv:
    return make_venv(tmp_path_factory.mktemp("ours"), built.wheels)


def project(source: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))
    return table


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_a_folder_is_named_as_its_distribution():
    assert {name: project(source)["project"]["name"] for name, source in PLUGINS.items()} == {
        name: name for name in PLUGINS
    }


def test_every_plugin_is_named_where_it_must_be():
    core = project(ROOT)
    extra = {re.split(r"[<>=]", text)[0] for text in core["project"]["optional-dependencies"]["plugins"]}
    required = re.findall(r"^-e plugins/(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert set(core["tool"]["uv"]["sources"]) == extra == set(required) == set(PLUGINS)


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_declares_what_all_declare(name: str):
    table = project(PLUGINS[name])
    assert table["project"]["license"] == "Apache-2.0"
    assert table["project"]["requires-python"] == project(ROOT)["project"]["requires-python"]
    assert "eulerforge-core>=0.1,<0.2" in table["project"]["dependencies"]
    assert table["project"]["entry-points"]["eulerforge.plugins"]
    assert table["tool"]["uv"]["sources"]["eulerforge-core"] == {"workspace": True}


@pytest.mark.parametrize("name", SOURCES)
def test_a_wheel_is_typed_and_describes_itself(built: Built, name: str):
    held = names(built.wheels[name])
    assert any(re.fullmatch(r"\w+/py\.typed", entry) for entry in held)
    assert not any(entry.startswith(("tests/", "docs/", "benchmarks/")) for entry in held)
    (metadata,) = (entry for entry in held if entry.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(built.wheels[name]) as archive:
        message = Parser().parsestr(archive.read(metadata).decode())
    assert (message["Name"], message["License-Expression"]) == (name, "Apache-2.0")
    assert message["Description-Content-Type"] == "text/markdown"
    assert message.get_payload().strip() == (SOURCES[name] / "README.md").read_text(encoding="utf-8").strip()


def test_the_cores_wheel_holds_every_preset_and_the_licence(built: Built):
    held = names(built.wheels["eulerforge-core"])
    presets = {f"eulerforge/presets/{path.name}" for path in (ROOT / "presets").iterdir()}
    assert presets
    assert presets <= held
    assert any(entry.endswith(".dist-info/licenses/LICENSE") for entry in held)


def test_the_cores_source_distribution_builds_the_same_wheel(built: Built, tmp_path: Path):
    with tarfile.open(built.sdists["eulerforge-core"]) as archive:
        # Python 3.11 has the filter from 3.11.4 on, and Debian 12 has 3.11.2
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = tmp_path.iterdir()
    (again,) = build(source, tmp_path / "again", "wheel")
    assert names(again) == names(built.wheels["eulerforge-core"])


def test_installed_one_by_one_each_is_found_and_passes_its_check(venv: Venv):
    venv.install("eulerforge-core")
    assert venv.rows() == {}
    assert "quickstart" in {row["name"] for row in venv.data("presets", "list")["presets"]}
    so_far: set[str] = set()
    for name in PLUGINS:
        venv.install(name)
        rows = venv.rows()
        new = set(rows) - so_far
        assert {rows[row]["distribution"] for row in new} == {name}
        for row in new:
            assert rows[row]["status"] == "ok", rows[row]
            assert venv.data("plugins", "check", row)["passed"]
        so_far |= new
    for name in PLUGINS:
        venv.uninstall(name)
    assert venv.rows() == {}


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_alone_beside_the_core_works(venv: Venv, name: str):
    venv.install(name)
    try:
        rows = venv.data("plugins", "list", "--strict-plugins")["plugins"]
        assert {row["distribution"] for row in rows} == {name}
    finally:
        venv.uninstall(name)


def test_every_extra_is_named_by_the_code():
    extras = project(ROOT)["project"]["optional-dependencies"]
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "eulerforge").rglob("*.py"))
    for extra in set(extras) - LIGHT_EXTRAS:
        for requirement in extras[extra]:
            module = re.split(r"[<>=\[]", requirement)[0].replace("-", "_")
            assert re.search(rf"\b(?:import|from) {module}\b|[\"']{module}[\"']", source), requirement
