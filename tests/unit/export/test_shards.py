"""The streamed file against safetensors' own reader, and the memory that writing one takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eulerforge.export import shards
from eulerforge.export.shards import Rewrite, read_header, write_shard

TENSORS = {
    "matrix": torch.randn(7, 5, dtype=torch.bfloat16),
    "fused": torch.randn(3, 4, 5),
    "half": torch.randn(9, dtype=torch.float16),
    "count": torch.tensor(12),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(1.5),
    "ünicode": torch.randn(3),
}


def nothing(name: str, tensor: torch.Tensor) -> None: ...


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "in.safetensors", metadata={"format": "pt", "note": "kept"})
    return tmp_path / "in.safetensors"


def test_a_copy_without_changes_holds_the_same_tensors(source: Path, tmp_path: Path) -> None:
    size = write_shard(source, tmp_path / "out.safetensors", {}, nothing)
    after = load_file(tmp_path / "out.safetensors")
    assert after.keys() == TENSORS.keys()
    assert all(tensor.dtype == TENSORS[name].dtype for name, tensor in after.items())
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in after.items())
    assert size == sum(tensor.nbytes for tensor in TENSORS.values())
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}


@pytest.mark.parametrize("block", [1, 24, shards.BLOCK])
@pytest.mark.parametrize("whole", [False, True])
def test_changed_rows_arrive_in_order_and_are_cast_once(
    source: Path, tmp_path: Path, block: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK", block)
    added = {name: torch.randn(TENSORS[name].shape) for name in ("matrix", "fused", "scalar")}
    calls: list[tuple[str, int, int]] = []

    def change(name: str):  # type: ignore[no-untyped-def]
        def add(part: torch.Tensor, first: int, last: int) -> torch.Tensor:
            assert part.dtype == torch.float32
            calls.append((name, first, last))
            return part + (added[name][first:last] if part.dim() else added[name])

        return add

    rewrites = {name: Rewrite(dtype=torch.bfloat16, change=change(name), whole=whole) for name in added}
    rewrites |= {"half": Rewrite(dtype=torch.float32), "empty": Rewrite(dtype=torch.float32, change=change("empty"))}
    write_shard(source, tmp_path / "out.safetensors", rewrites, nothing)
    after = load_file(tmp_path / "out.safetensors")
    for name, extra in added.items():
        assert torch.equal(after[name], (TENSORS[name].float() + extra).bfloat16())
    assert torch.equal(after["half"], TENSORS["half"].float())
    assert torch.equal(after["flags"], TENSORS["flags"])
    expected = 7 if block == 1 and not whole else 3 if block == 24 and not whole else 1
    assert sum(name == "matrix" for name, _, _ in calls) == (4 if expected == 3 else expected)


def test_every_tensor_is_aligned_for_readers_that_map_the_file(source: Path, tmp_path: Path) -> None:
    rewrites = {"fused": Rewrite(dtype=torch.float64), "matrix": Rewrite(dtype=torch.float32)}
    write_shard(source, tmp_path / "out.safetensors", rewrites, nothing)
    after = load_file(tmp_path / "out.safetensors")
    for entry in read_header(tmp_path / "out.safetensors")[0]:
        assert entry.start % after[entry.name].element_size() == 0, entry.name


MEASURE = """
import re, sys
import torch
from eulerforge.export.shards import Rewrite, read_header, write_shard
source, out = map(__import__("pathlib").Path, sys.argv[1:])
torch.ones(64, 64) @ torch.ones(64, 64)
rewrites = {
    entry.name: Rewrite(dtype=torch.bfloat16, change=lambda part, first, last: part + torch.ones(part.shape) * 0.5)
    for entry in read_header(source)[0]
}
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")
before = peak()
write_shard(source, out, rewrites, lambda name, tensor: None)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    # one tensor makes the whole shard: the worst case
    save_file({"weight": torch.zeros(3 * 2**16, 1024, dtype=torch.bfloat16)}, tmp_path / "in.safetensors")
    size = (tmp_path / "in.safetensors").stat().st_size
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "in.safetensors", tmp_path / "out.safetensors"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    grown = int(run.stdout) * 1024
    # a block (4 MiB) as it is read, in fp32, changed and cast is about ten blocks, and the allocator keeps some
    assert grown < 36 * shards.BLOCK
    assert grown < 0.5 * size
    assert load_file(tmp_path / "out.safetensors")["weight"][-1, -1] == 0.5
