"""Kill a run at every operation on its folder, resume it, and compare; one process imports torch once and forks.

Called as a script with one JSON argument; prints one JSON line per kill.
Forking is safe because nothing here has started a second thread: torch is held to one.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import tinyrun
from disk import TEAR, Disk, once


def main(request: dict[str, Any]) -> None:
    folder, settings = Path(request["folder"]), request["settings"]
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    straight = folder / "straight"
    shutil.rmtree(straight, ignore_errors=True)
    code, operations = train(folder, straight, settings)
    import_all(folder / "modules.json")
    print(json.dumps({"straight": code, "operations": operations}), flush=True)
    wanted = outcome(straight)
    points = [(mode, number) for mode in request["modes"] for number in range(1, len(operations) + 1)]
    for mode, number in points[request.get("first", 0) :: request.get("every", 1)]:
        name = operations[number - 1]
        if mode == TEAR and not name.startswith("write"):
            continue  # the same as dying before it
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        killed, _ = train(folder, out, settings, mode=mode, number=number)
        resumed, said = train(folder, out, settings, resume=True)
        left = sorted(path.name for path in out.iterdir() if path.name.startswith((".staging", ".replaced")))
        result = {"mode": mode, "number": number, "operation": name, "killed": killed, "resumed": resumed, "said": said}
        print(json.dumps({**result, "same": outcome(out) == wanted, "left": left}), flush=True)


def train(
    folder: Path,
    out: Path,
    settings: dict[str, Any],
    *,
    mode: str | None = None,
    number: int = 0,
    resume: bool = False,
) -> tuple[int, list[str]]:
    """Run ``eulerforge train`` in a child; give back its exit code, and its operations or what it said."""
    words = tinyrun.arguments(folder, **settings, output_dir=str(out)) + (["--resume"] if resume else [])
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            with (folder / "said.txt").open("w") as file, contextlib.redirect_stderr(file), Quiet():
                code = _run(out, words, mode, number, report)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if resume:
        marks = ("resumed from", "at step 0", "is finished", "skipped", "error", "removed", "put back")
        lines = (folder / "said.txt").read_text().splitlines()
        return code, [line.replace(str(out), "RUN") for line in lines if any(mark in line for mark in marks)]
    return code, json.loads(report.read_text()) if report.exists() else []


def _run(out: Path, words: list[str], mode: str | None, number: int, report: Path) -> int:
    from eulerforge.cli.main import main as eulerforge

    disk = Disk(out, once(number, mode) if mode else lambda at, name, path: None)
    with disk.watched():
        code = eulerforge(words)
    report.write_text(json.dumps(disk.operations))
    (report.parent / "modules.json").write_text(json.dumps(list(sys.modules)))
    return code


def import_all(names: Path) -> None:
    """Import here what a child had to, so that the next ones have it from the start; seconds become milliseconds."""
    for name in json.loads(names.read_text()):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    assert threading.active_count() == 1, "a process with threads must not fork"
    gc.freeze()  # the collector would touch, and so copy, every page in every child


class Quiet(contextlib.redirect_stdout):  # type: ignore[type-arg]
    """No summaries on our stdout, which is for results."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull).open("w"))  # noqa: SIM115


def outcome(out: Path) -> dict[str, Any]:
    """What two equal runs agree on: the tensors' files, the losses, how far it got."""
    files = sorted(out.glob("checkpoint-*/*.safetensors")) + sorted(out.glob("final/*.safetensors"))
    hashes = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    metrics = tinyrun.metrics(out) if (out / "metrics.jsonl").exists() else []
    return {"files": hashes, "metrics": metrics}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
