"""A million rows: the first step comes soon, memory stays flat, and a bad row is named by its true line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slowness import bare_cpu_seconds, slower
from tiny import save_tiny

ROWS = 1_000_000
SECONDS = 60
"""On the machine that bounds were set on; more on a slower one."""
BYTES = int(1.5 * 2**30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("million")
    save_tiny(path / "base")
    with (path / "rows.jsonl").open("w", encoding="utf-8") as file:
        for start in range(0, ROWS, 1000):
            file.write(
                "".join(f'{{"prompt":"What is {n}?","response":"{n % 7}."}}\n' for n in range(start, start + 1000))
            )
    return path


def train(folder: Path, rows: Path) -> tuple[subprocess.CompletedProcess[str], float, float, int]:
    """Train one step in a process of its own: (result, wall seconds, CPU seconds, peak bytes)."""
    preset = folder / "preset.toml"
    preset.write_text(
        f"""
model_name = "{folder / "base"}"
device = "cpu"
output_dir = "{folder / "run"}"
[data]
path = "{rows}"
max_length = 64
[training]
max_train_steps = 1
batch_size = 8
[checkpoint]
include_base = false
""",
        encoding="utf-8",
    )
    # with a fresh child each time, the maximum over the children is this one's once it is the largest
    code = (
        "import json, resource, sys\nfrom eulerforge.cli.main import main\ncode = main(sys.argv[1:])\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(json.dumps([used.ru_maxrss * 1024, used.ru_utime + used.ru_stime]))\nsys.exit(code)"
    )
    command = [sys.executable, "-c", code, "train", "--preset", str(preset), "--overwrite"]
    environ = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    wall = time.perf_counter() - began
    peak, cpu = json.loads(done.stdout.strip().splitlines()[-1])
    return done, wall, cpu, peak


def test_the_first_step_comes_soon_in_flat_memory(folder: Path) -> None:
    done, wall, cpu, peak = train(folder, folder / "rows.jsonl")
    assert done.returncode == 0, done.stderr
    assert "step 1/1" in done.stderr
    assert f"training: {ROWS:,} rows" in done.stderr
    most = SECONDS * slower(bare_cpu_seconds())
    assert wall < most, f"{wall:.0f} s of wall time, {cpu:.0f} s of the CPU, load {os.getloadavg()}"
    assert peak < BYTES, peak
    again, wall_again, _, _ = train(folder, folder / "rows.jsonl")
    assert "token cache: hit" in again.stderr
    assert wall_again < wall


def test_a_bad_row_is_named_by_its_true_line(folder: Path) -> None:
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").split("\n")
    lines[543_221] = '{"prompt": "What?", "response": 7}'
    bad = folder / "bad.jsonl"
    bad.write_text("\n".join(lines), encoding="utf-8")
    done, _, _, peak = train(folder, bad)
    assert done.returncode == 2
    assert f"error: {bad}:543222: response: must be a string, not a number" in done.stderr
    assert "Traceback" not in done.stderr
    assert peak < BYTES
