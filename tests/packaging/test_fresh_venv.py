"""Third-party wheels in a fresh virtual environment: built, installed, listed, used, uninstalled, gone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from freshvenv import Venv, build, make_venv
from tiny import save_tiny, write_rows

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).parents[2]
THIRD_PARTY = ROOT / "tests" / "thirdparty"
SOURCES = {
    "core": ROOT,
    "demo": THIRD_PARTY / "eulerforge-demo",
    **{folder.name: folder for folder in sorted((THIRD_PARTY / "faulty").iterdir()) if folder.is_dir()},
}


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Venv:
    folder = tmp_path_factory.mktemp("fresh")
    wheels = {name: build(source, folder / "wheels" / name, "wheel")[0] for name, source in SOURCES.items()}
    made = make_venv(folder, wheels)
    made.install("core")
    return made


@pytest.fixture(scope="module")
def preset(venv: Venv) -> Path:
    """A preset that names the demo's strategy and backbone, with a tiny model and rows of its own."""
    model = save_tiny(venv.folder / "tiny-llama")
    rows = write_rows(venv.folder / "rows.jsonl")
    path = venv.folder / "demo.toml"
    path.write_text(
        f"""
model_name = "{model}"
device = "cpu"
backbone = "demo_llama"

[injection]
strategy = "demo_scale"
target_keywords = ["down_proj", "o_proj"]
initial_scale = 1.0

[data]
path = "{rows}"
max_length = 128

[data.validation]
size = 4

[training]
max_train_steps = 5
batch_size = 4
lr = 2e-2
log_steps = 1
"""
    )
    return path


@pytest.fixture
def demo(venv: Venv) -> Any:
    venv.install("demo")
    yield
    venv.uninstall("eulerforge-demo")


def test_the_core_alone_has_no_plugins(venv: Venv):
    assert venv.rows() == {}
    done = venv.run("plugins", "list")
    assert (done.returncode, done.stdout) == (0, "")
    assert "no plugin is installed" in done.stderr


def test_a_third_party_wheel_is_listed_shown_checked_and_gone(venv: Venv):
    venv.install("demo")
    row = venv.rows()["demo"]
    assert (row["distribution"], row["version"], row["status"]) == ("eulerforge-demo", "0.3.0", "ok")
    assert [(offer["kind"], offer["name"]) for offer in row["offers"]] == [
        ("backbone", "demo_llama"),
        ("strategy", "demo_scale"),
        ("phase_group", "demo"),
    ]
    (shown,) = venv.data("plugins", "show", "eulerforge-demo:demo_scale")["plugins"]
    keys = {key["name"]: key for offer in shown["offers"] for key in offer.get("keys", ())}
    assert keys["injection.initial_scale"] == {
        "name": "injection.initial_scale",
        "type": "float",
        "default": 1.0,
        "default_text": "1.0",
        "required": False,
        "help": "The factor that every output starts with; 1 changes nothing",
        "choices": [],
    }
    assert "model types: llama" in venv.run("plugins", "show", "demo_llama").stdout
    assert venv.data("plugins", "check", "demo")["passed"]
    venv.uninstall("eulerforge-demo")
    assert venv.rows() == {}
    (problem,) = venv.data("plugins", "show", "demo", code=3)
    assert problem["message"] == "there is no plugin 'demo'"


@pytest.mark.usefixtures("demo")
def test_a_real_run_with_third_party_parts(venv: Venv, preset: Path):
    checked = venv.run("train", "--preset", str(preset), "--validate-only")
    assert checked.returncode == 0, checked.stderr
    out = venv.folder / "run"
    done = venv.run("train", "--preset", str(preset), "--output-dir", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum("grad_norm" in line for line in losses) >= 5
    saved = (out / "final" / "adapter.safetensors").read_bytes()
    assert saved == (out / "checkpoint-5" / "adapter.safetensors").read_bytes()
    names = set(json.loads(saved[8 : 8 + int.from_bytes(saved[:8], "little")])) - {"__metadata__"}
    assert len(names) == 6
    assert all(name.endswith(".output_scale") for name in names)
    assert "eulerforge-demo" in (out / "receipt.json").read_text()


def test_a_run_whose_plugin_is_gone_says_so(venv: Venv, preset: Path):
    done = venv.run("train", "--preset", str(preset), "--validate-only")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "there is no strategy 'demo_scale'" in done.stderr
    assert "Traceback" not in done.stderr


FAULTY = {
    "import_raises": ("broken", "RuntimeError while loading: the driver of this plugin is not there"),
    "hook_raises": ("broken", "OSError while calling eulerforge_presets: the list of presets"),
    "sys_exit": ("broken", "it called sys.exit(5) while loading"),
    "wrong_api": ("incompatible", "it was written for API 2.0, this core has API 1.0"),
    "name_taken": ("conflict", "strategy 'demo_scale' is offered by eulerforge-demo:demo too"),
}


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_plugin_is_a_row_and_the_tool_works(venv: Venv, preset: Path, name: str):
    distribution = f"eulerforge-faulty-{name.replace('_', '-')}"
    status, reason = FAULTY[name]
    venv.install(name)
    try:
        rows = venv.rows()
        assert rows[name]["status"] == status
        assert reason in rows[name]["reason"]
        assert rows[name]["hint"]
        assert reason in venv.run("plugins", "list").stdout
        assert venv.run("plugins", "list", "--strict-plugins").returncode == 3
        assert venv.run("plugins", "list", "--strict-plugins", "--no-plugin", name).returncode == 0
        assert venv.data("plugins", "check", name, code=3)["passed"] is False
        validate = ("train", "--preset", str(preset), "--validate-only")
        # a run that does not need the faulty plugin goes on; one whose name is contested stops
        contested = name == "name_taken"
        done = venv.run(*validate)
        assert done.returncode == (3 if contested else 0), done.stderr
        assert "Traceback" not in done.stderr
        if contested:
            assert "several plugins offer the strategy 'demo_scale'" in done.stderr
            qualified = venv.run(*validate, "--set", "injection.strategy=eulerforge-demo:demo_scale")
            assert qualified.returncode == 0, qualified.stderr
        else:
            missing = venv.run(*validate, "--set", "injection.strategy=unheard_of")
            assert missing.returncode == 3
            assert f"{distribution}:{name}" in missing.stderr
        assert venv.run(*validate, "--strict-plugins").returncode == 3
        assert venv.run(*validate, EULERFORGE_DISABLE_PLUGINS=name).returncode == 0
    finally:
        venv.uninstall(distribution)
    assert name not in venv.rows()
