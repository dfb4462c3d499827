"""What PEFT + TRL do when a process is stopped, killed, out of room or not alone: the rest of docs/reliability.md.

    OMP_NUM_THREADS=1 python benchmarks/faults_peers_stops.py FOLDER

Step 6 of 6 is the step that is hit, the save of step 4 the save that is hit.
One JSON line per fault: the exit code as a shell gives it, the last line that was printed, the checkpoints left, and
what ``resume_from_checkpoint=True`` then does.
``strace`` is wanted for one of them, which is left out where there is none.
"""

from __future__ import annotations

import collections
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults_peers as peers
import peft
import torch
import transformers
from faults_peers_forks import Bench, at_files, ended, fork, in_step, send, show


def signals(bench: Bench) -> None:
    """In a step, before the first step; an ignored one; with the Trainer's own option for SIGTERM."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        bench.stopped(
            f"{number.name} in step 6",
            number.name,
            lambda trainer, number=number: in_step(trainer, lambda: send(number)).train(),
        )
    # the option waits three seconds before it acts: a step must last longer than that to be met by it
    bench.stopped(
        "SIGTERM in step 5, which takes 4 s, with enable_jit_checkpoint=True",
        "jit",
        lambda trainer: in_step(trainer, lambda: (send(signal.SIGTERM), time.sleep(4)), step=5).train(),
        enable_jit_checkpoint=True,
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        out = bench.folder / f"early-{number.name}"
        shutil.copytree(bench.straight, out)

        def early(number: int = number, out: Path = out) -> None:
            peers.LoraConfig = lambda **_: send(number)  # between the rows and the model
            bench.trainer(out).train()

        code, said = ended(fork(early))
        kept = peers.same(bench.straight, out)
        show(f"{number.name} before the first step", code=code, said=said, what_was_there_is_kept=kept)

    def ignored(trainer: peers.SFTTrainer) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        in_step(trainer, lambda: send(signal.SIGHUP)).train()

    out, code, said = bench.start("nohup", ignored)
    show("SIGHUP set to be ignored, in step 6", code=code, said=said, bit_identical=peers.same(bench.straight, out))


def saves(bench: Bench) -> None:
    """Killed before each file of a save; Ctrl-C there; no room for a file."""
    names: list[str] = []
    listing = bench.folder / "names"

    def list_names(trainer: peers.SFTTrainer) -> None:
        at_files(lambda _, name: names.append(name))
        trainer.train()
        listing.write_text("\n".join(names))

    bench.start("names-run", list_names)
    for index, name in enumerate(listing.read_text().split("\n"), start=1):

        def killed(trainer: peers.SFTTrainer, index: int = index) -> None:
            at_files(lambda number, _: send(signal.SIGKILL) if number == index else None)
            trainer.train()

        bench.stopped(f"killed in the save of step 4, before {name}", f"killed{index}", killed)

    def interrupted(trainer: peers.SFTTrainer) -> None:
        at_files(lambda _, name: send(signal.SIGINT) if name == "optimizer.pt" else None)
        trainer.train()

    bench.stopped("SIGINT in the save of step 4, at optimizer.pt", "interrupted", interrupted)

    for name in ("adapter_model.safetensors", "optimizer.pt"):

        def full(trainer: peers.SFTTrainer, name: str = name) -> None:
            limit = (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            at_files(lambda _, met: resource.setrlimit(resource.RLIMIT_FSIZE, limit) if met == name else None)
            trainer.train()

        bench.stopped(f"no room in the save of step 4, for {name}", f"full-{name}", full)


def others(bench: Bench) -> None:
    """Two runs in one folder, nobody reads the output, no memory."""
    out = bench.folder / "shared"
    first_waits, second_is_done = bench.folder / "waits", bench.folder / "done"

    def wait() -> None:
        first_waits.touch()
        while not second_is_done.exists():
            time.sleep(0.05)

    first = fork(lambda: in_step(bench.trainer(out), wait).train())
    while not first_waits.exists():
        time.sleep(0.05)
    _, code, said = bench.start("shared", lambda trainer: trainer.train(), learning_rate=0.001)
    second_is_done.touch()
    first_code, first_said = ended(first)
    of_first = {
        path.name: (path / name).read_bytes() == (bench.straight / path.name / name).read_bytes()
        for name in ["adapter_model.safetensors"]
        for path in sorted(out.glob("checkpoint-*"))
    }
    show("two runs in one folder at once", codes=[first_code, code], said=[first_said, said], of_the_first=of_first)

    # what is printed to a pipe is buffered, 8 KiB: six steps never reach the closed pipe, 80 do
    for numbers, steps in (([1], peers.STEPS), ([1], 80), ([1, 2], peers.STEPS)):

        def leave(numbers: list[int] = numbers) -> None:
            log = os.dup(2)
            sys.excepthook = lambda kind, error, _: os.write(log, f"\n{kind.__name__}: {error}\n".encode()) and None
            reader, writer = os.pipe()
            os.close(reader)
            for number in numbers:
                os.dup2(writer, number)

        out, code, said = bench.start(
            f"nobody-{len(numbers)}-{steps}",
            lambda trainer, leave=leave: in_step(trainer, leave, step=5).train(),
            disable_tqdm=False,
            max_steps=steps,
        )
        names = " and ".join(["stdout", "stderr"][: len(numbers)])
        saved = len(list(out.glob("checkpoint-*")))
        show(
            f"the reader of {names} goes away in step 5 of {steps}",
            code=code,
            said=said,
            saved=f"{saved} of {steps // 2}",
        )

    bench.stopped(
        "out of memory in step 6",
        "memory",
        lambda trainer: in_step(trainer, lambda: torch.empty(1 << 50)).train(),
    )


def merge(bench: Bench) -> None:
    """SIGTERM at the second shard of a merged model."""
    out = bench.folder / "merged"

    def run() -> None:
        base = transformers.AutoModelForCausalLM.from_pretrained(bench.folder / "base")
        adapter = bench.straight / f"checkpoint-{peers.STEPS}"
        model = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
        plain, shards = transformers.modeling_utils.safe_save_file, []

        def save(*args: object, **options: object) -> None:
            shards.append(args)
            send(signal.SIGTERM) if len(shards) == 2 else plain(*args, **options)

        transformers.modeling_utils.safe_save_file = save
        model.save_pretrained(out, max_shard_size="20KB")

    code, said = ended(fork(run))
    show("SIGTERM in a merge", code=code, said=said, files=sorted(path.name for path in out.glob("*")))


def flushes(folder: Path) -> None:
    """How often a whole run asks the kernel to flush a file, and to rename one."""
    if shutil.which("strace") is None:
        return
    log = folder / "strace.txt"
    calls = "fsync,fdatasync,sync,syncfs,sync_file_range,msync,rename,renameat,renameat2"
    command = ["strace", "-f", "-o", str(log), "-e", f"trace={calls}", sys.executable, __file__, str(folder), "plain"]
    subprocess.run(command, check=True, capture_output=True)
    lines = [line for line in log.read_text().splitlines() if "(" in line and "resumed" not in line]
    ours = [line for line in lines if "sync" in line or "traced/checkpoint" in line]
    counts = collections.Counter(line.split()[1].split("(")[0] for line in ours)
    show("flushes and renames in a run with three saves", calls=counts)


if __name__ == "__main__":
    if sys.argv[2:] == ["plain"]:
        given = Path(sys.argv[1])
        peers.trainer(given, given / "traced", given / "rows.jsonl").train()
    else:
        bench = Bench(Path(sys.argv[1]))
        signals(bench)
        saves(bench)
        others(bench)
        merge(bench)
        flushes(bench.folder)
