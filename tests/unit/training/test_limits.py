"""What a process may still take: the machine's free memory, and the limits of both versions of control groups."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from eulerforge.training.limits import address_space_left, container_left, free_bytes, machine_free, resident_bytes

GIB = 1 << 30


def files(folder: Path, **contents: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n", encoding="utf-8")
    return folder


def membership(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cgroup"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_machine_says_what_is_available(tmp_path: Path) -> None:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal: 8000 kB\nMemAvailable: 3000 kB\nHugePages_Total: 0\n", encoding="utf-8")
    assert machine_free(path) == 3000 * 1024
    assert 1 << 20 < machine_free(tmp_path / "none") < 1 << 50


def test_the_second_version_counts_every_group_above_and_forgives_idle_file_cache(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    files(root / "a", memory__max=8 * GIB, memory__current=7 * GIB, memory__stat=f"anon 1\ninactive_file {2 * GIB}")
    files(root / "a" / "b", memory__max="max", memory__current=GIB)
    assert container_left(root, membership(tmp_path, "0::/a/b\n")) == 3 * GIB
    files(root / "a" / "b", memory__max=2 * GIB)
    assert container_left(root, membership(tmp_path, "0::/a/b\n")) == GIB


def test_the_first_version_has_a_folder_for_memory_and_a_number_for_no_limit(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    own = {"memory__usage_in_bytes": GIB, "memory__stat": f"total_inactive_file {GIB}"}
    files(root / "memory" / "job", memory__limit_in_bytes=4 * GIB, **own)
    files(root / "memory", memory__limit_in_bytes=(1 << 63) - 4096, memory__usage_in_bytes=9 * GIB)
    member = membership(tmp_path, "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/\n")
    assert container_left(root, member) == 4 * GIB


def test_inside_a_container_the_limit_lies_at_the_top(tmp_path: Path) -> None:
    root = files(tmp_path / "fs", memory__max=5 * GIB, memory__current=GIB)
    assert container_left(root, membership(tmp_path, "0::/docker/0123\n")) == 4 * GIB


@pytest.mark.parametrize("text", ["0::/a\n", "3:pids:/a\n"])
def test_without_a_limit_there_is_none(tmp_path: Path, text: str) -> None:
    assert container_left(tmp_path / "fs", membership(tmp_path, text)) is None
    assert container_left(tmp_path / "fs", tmp_path / "absent") is None


def test_this_process_holds_something_and_may_take_more() -> None:
    assert 1 << 20 < free_bytes(torch.device("cpu")) < 1 << 50
    assert (resident_bytes() or 1 << 30) > 10 << 20


def test_a_limit_of_addresses_bounds_what_is_free() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    if before[0] == resource.RLIM_INFINITY:
        assert address_space_left() is None
    used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIB, before[1]))
    try:
        left, free = address_space_left(), free_bytes(torch.device("cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert left is not None
    assert 0.9 * GIB < left <= GIB
    assert free <= left
