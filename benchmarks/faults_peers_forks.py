"""Runs of a peer's trainer in processes of their own, a fault at a step or at a file of a save, and its resume.

For ``faults_peers_stops.py``.
A process is forked after the imports, so that a run takes a second; nothing was trained in it before.
"""

from __future__ import annotations

import builtins
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import faults_peers as peers
import peft.peft_model
import torch

HIT = f"checkpoint-{peers.STEPS - 2}"  # the checkpoint whose save is hit


class Process(NamedTuple):
    pid: int
    output: int  # what it prints, to be read


def fork(action: Callable[[], Any]) -> Process:
    """A process that runs the action and ends as any Python program ends."""
    sys.stdout.flush()
    output, target = os.pipe()  # no file: a limit on the size of files must not cut what is printed
    pid = os.fork()
    if pid:
        os.close(target)
        return Process(pid, output)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115 - they live as long as the process
    action()
    raise SystemExit(0)


def ended(process: Process) -> tuple[int, str | None]:
    """Its exit code, 128 + the signal if one ended it, and its last line worth reading."""
    with os.fdopen(process.output, encoding="utf-8", errors="replace") as printed:
        text = printed.read()
    code = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
    return (128 - code if code < 0 else code), last(text)


def last(text: str) -> str | None:
    """The last line that is not a progress bar, a loss or the note on the tokenizer that every start prints."""
    dull = ("{'", "[transformers] The tokenizer has new")
    lines = text.replace("\r", "\n").splitlines()
    said = [line for line in lines if line.strip() and not line.lstrip().startswith(dull) and "it/s]" not in line]
    return said[-1][:300] if said else None


def in_step(trainer: peers.SFTTrainer, do: Callable[[], Any], step: int = peers.STEPS) -> peers.SFTTrainer:
    """Calls ``do`` once, in the forward pass of a step."""

    def hook(*_: Any) -> None:
        if trainer.state.global_step == step - 1:
            handle.remove()
            do()

    handle = trainer.model.register_forward_pre_hook(hook)
    return trainer


def at_files(do: Callable[[int, str], Any]) -> None:
    """Calls ``do(number, name)`` just before each file that Python opens for the hit checkpoint is written."""
    seen: list[str] = []

    def meet(path: Any) -> None:
        if HIT in str(path) and str(path) not in seen:
            seen.append(str(path))
            do(len(seen), Path(path).name)

    def wrap(owner: Any, name: str, place: int) -> None:
        plain = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            writes = name != "open" or any(letter in str([*args[1:2], options.get("mode")]) for letter in "wxa+")
            if writes and len(args) > place:
                meet(args[place])
            return plain(*args, **options)

        setattr(owner, name, wrapped)

    wrap(torch, "save", 1)
    wrap(peft.peft_model, "safe_save_file", 1)
    wrap(builtins, "open", 0)


class Bench:
    """A folder with a model, rows and an undisturbed run to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, peers.prepare(folder)
        self.straight = self.start("straight", lambda trainer: trainer.train())[0]

    def trainer(self, out: Path, **options: Any) -> peers.SFTTrainer:
        return peers.trainer(self.folder, out, self.rows, **options)

    def start(self, name: str, run: Callable[[peers.SFTTrainer], Any], **options: Any) -> tuple[Path, int, str | None]:
        """The folder, the exit code and the last line of a run in a process of its own."""
        out = self.folder / name
        return out, *ended(fork(lambda: run(self.trainer(out, **options))))

    def resume(self, out: Path, **options: Any) -> dict[str, Any]:
        _, code, said = self.start(out.name, lambda trainer: trainer.train(resume_from_checkpoint=True), **options)
        whole = (out / f"checkpoint-{peers.STEPS}" / "trainer_state.json").is_file()
        return {
            "resume_code": code,
            "resume_said": said,
            "bit_identical": whole and code == 0 and peers.same(self.straight, out),
        }

    def stopped(self, fault: str, name: str, run: Callable[[peers.SFTTrainer], Any], **options: Any) -> None:
        """Shows a run that a fault ends, its resume, and if that fails one after the hit checkpoint is deleted."""
        out, code, said = self.start(name, run, **options)
        facts: dict[str, Any] = {"left": sorted(path.name for path in out.glob("checkpoint-*"))}
        if "save" in fault:
            facts["files"] = sorted(path.name for path in (out / HIT).glob("*"))
        facts |= self.resume(out)
        if facts["resume_code"]:
            shutil.rmtree(out / HIT)
            facts["bit_identical_once_it_is_deleted"] = self.resume(out)["bit_identical"]
        show(fault, code=code, said=said, **facts)


def show(fault: str, **facts: Any) -> None:
    print(json.dumps({"fault": fault, **facts}), flush=True)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
