"""From ``eulerforge train`` to the first optimizer step, beyond what importing torch and transformers costs anyway.

Whole processes in turns: the bare imports, the imports of the model's own classes, and the command itself, which ends
as soon as its first step has. The model is converted, the rows are tokenized and our modules are compiled to bytecode,
as the installed packages' are, before anything is measured.
Measured twice: without held-out rows and samples, which is set-up alone, and with those of the preset, which the
untuned model is measured with before the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

CLASSES = "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig"
MODELLING = {"llama": "from transformers import LlamaForCausalLM, LlamaConfig; import transformers.models.auto"}
IMPORTS = {
    "python": "pass",
    "torch + transformers": "import torch, transformers",
    "torch + transformers + the model's classes": f"import torch, transformers; {CLASSES}; {MODELLING['llama']}",
}
HELD_OUT = "[data.validation]\nsize = 50\n"


def without_held_out(folder: Path) -> Path:
    """The quickstart's preset without what measures the untuned model before the first step."""
    from eulerforge.config.presets import find_preset

    text = find_preset("quickstart").path.read_text(encoding="utf-8")
    if HELD_OUT not in text:
        raise SystemExit("the quickstart's preset has changed: benchmarks/startup.py no longer knows its held-out rows")
    path = folder / "setup_alone.toml"
    path.write_text(
        text.replace(HELD_OUT, "").replace("samples = 1", "samples = 0").replace("val_steps = 20", "val_steps = 0"),
        encoding="utf-8",
    )
    return path


def resident() -> dict[str, int]:
    """Bytes in memory now: the process's own, and pages of files that the system may drop; empty where not Linux."""
    if sys.platform != "linux":
        return {}
    status = Path("/proc/self/status").read_text(encoding="ascii")
    sizes = dict(line.split(":") for line in status.splitlines())
    names = {"anonymous": "RssAnon", "of_files": "RssFile"}
    return {name: int(sizes[entry].split()[0]) * 1024 for name, entry in names.items()}


def child(arguments: list[str], marks: Path) -> None:
    """Run the command in this process, and leave it after its first step; runs in a fresh process."""
    from eulerforge.cli.main import main as eulerforge

    facts: dict[str, Any] = {}

    def mark(name: str) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        facts[name] = {
            "at": time.time(),
            "cpu": usage.ru_utime + usage.ru_stime,
            "rss": usage.ru_maxrss * 1024,
            **resident(),
        }

    class Watch:
        """Wraps the two functions when their module has been imported, at the time that the command imports it."""

        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "eulerforge.training.summary":  # imported after the loop
                wrap()

    def wrap() -> None:
        from eulerforge.data.batches import BatchPlan
        from eulerforge.training.metrics import MetricsLog

        rows_of, write = BatchPlan.rows_of, MetricsLog.write

        def begins(plan: BatchPlan, step: int) -> Any:
            if "begins" not in facts:
                facts["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
                mark("begins")
            return rows_of(plan, step)

        def ends(log: MetricsLog, row: dict[str, Any]) -> None:
            write(log, row)
            if "grad_norm" in row:
                mark("ends")
                marks.write_text(json.dumps(facts), encoding="utf-8")
                os._exit(0)

        BatchPlan.rows_of, MetricsLog.write = begins, ends  # type: ignore[method-assign]

    sys.meta_path.insert(0, Watch())  # type: ignore[arg-type]
    sys.exit(eulerforge(["train", *arguments]) or 1)


def run_child(arguments: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """{"begins" | "ends": {wall, cpu, rss}} of one start in a fresh process, seconds from the process's start."""
    environment = dict(os.environ if environment is None else environment)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder) / "marks.json"
        command = [sys.executable, __file__, "--child", str(marks), *arguments, "--output-dir", f"{folder}/run"]
        began = time.time()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not marks.exists():
            raise SystemExit(f"the run failed:\n{done.stderr}")
        facts: dict[str, Any] = json.loads(marks.read_text(encoding="utf-8"))
    for name in ("begins", "ends"):
        facts[name]["wall"] = facts[name].pop("at") - began
    return facts


def run_import(code: str) -> dict[str, float]:
    """Wall and CPU seconds of a process that only imports, and does not tidy up, as a start has not when it begins."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    subprocess.run([sys.executable, "-c", f"{code}\nimport os; os._exit(0)"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": time.time() - began, "cpu": cpu}


def measure(arguments: list[str], rounds: int) -> dict[str, Any]:
    """Medians over rounds of interleaved processes."""
    run_child(arguments)  # converts, tokenizes, warms the disk's cache
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name, code in IMPORTS.items():
            found.setdefault(name, []).append(run_import(code))
        facts = run_child(arguments)
        for name in ("begins", "ends"):
            found.setdefault(f"first step {name}", []).append(facts[name])
    medians = {
        name: {unit: statistics.median(one[unit] for one in all_of) for unit in all_of[0]}
        for name, all_of in found.items()
    }
    begins = medians["first step begins"]
    beyond = {name: {unit: begins[unit] - medians[name][unit] for unit in ("wall", "cpu")} for name in IMPORTS}
    return {"medians": medians, "beyond": beyond, "rounds": found}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[3:], Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        alone = measure(["--preset", str(without_held_out(Path(folder)))], args.rounds)
    result: dict[str, Any] = {
        "date": str(date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "python": platform.python_version(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "set-up alone": alone,
        "as the preset is": measure(["--preset", "quickstart"], args.rounds),
    }
    for kind in ("set-up alone", "as the preset is"):
        print(f"\n{kind}: wall s, CPU s")
        for name, units in result[kind]["medians"].items():
            print(f"  {name:48} {units['wall']:6.2f} {units['cpu']:6.2f}")
        for name, units in result[kind]["beyond"].items():
            print(f"  first step begins, beyond {name:36} {units['wall']:6.2f} {units['cpu']:6.2f}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
