"""How much memory this process may still take: what the machine has free, its container and ``ulimit -v`` allow.

Notable: a container's limit counts the cache of read files too, which the kernel gives up before it kills anything, so
that part is not subtracted.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

import attrs
import torch

from eulerforge.models.room import trim_heap

UNLIMITED = 1 << 60
"""What the first version of control groups says for no limit is a number about as large as this."""


@attrs.frozen(kw_only=True)
class Room:
    """``base`` bytes that the process holds on the device, and ``free`` ones that it may still take."""

    base: int
    free: int

    @classmethod
    def now(cls, device: torch.device) -> Room:
        """On the CPU after the C library gave back what it can; on CUDA torch's own, which is nothing at the start."""
        return cls(base=0 if device.type == "cuda" else settled_bytes(), free=free_bytes(device))


def free_bytes(device: torch.device) -> int:
    """Bytes that may still be taken: as the driver says on CUDA, elsewhere the least of machine and container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    found = [machine_free(Path("/proc/meminfo"))]
    left = container_left(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    room = address_space_left()
    return min([*found, *(bound for bound in (left, room) if bound is not None)])


def address_space_left() -> int | None:
    """What ``ulimit -v`` leaves of the addresses that this process may use; None without such a limit."""
    limit, statm = resource.getrlimit(resource.RLIMIT_AS)[0], Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not statm.exists():
        return None
    return max(0, limit - int(statm.read_text(encoding="utf-8").split()[0]) * os.sysconf("SC_PAGE_SIZE"))


def machine_free(meminfo: Path) -> int:
    """MemAvailable, or half of the memory where the system does not say."""
    if meminfo.exists():
        facts = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines() if ":" in line)
        return int(facts["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def container_left(root: Path, membership: Path) -> int | None:
    """What the control groups of this process, and those above them, leave of their limits; None without a limit."""
    if not membership.exists():
        return None
    left = []
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inner = top / group.lstrip("/")
        # inside a container the group's own path may not exist: its files lie at the top
        for folder in [inner, *inner.parents]:
            if folder == top.parent:
                break
            limit, used = _number(folder / names[0]), _number(folder / names[1])
            if limit is not None and used is not None and limit < UNLIMITED:
                left.append(max(0, limit - used + _file_cache(folder)))
    return min(left, default=None)


def resident_bytes() -> int | None:
    """What this process holds now; None where the system does not say."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    return int(statm.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def settled_bytes() -> int:
    """Bytes that the process holds, after the C library gave back what it can; 0 where the system does not say."""
    trim_heap()
    return resident_bytes() or 0


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _file_cache(folder: Path) -> int:
    """Bytes of files that the group has in its cache and has not used lately."""
    try:
        text = (folder / "memory.stat").read_text(encoding="utf-8")
    except OSError:
        return 0
    facts = dict(line.split(None, 1) for line in text.splitlines() if " " in line)
    return int(facts.get("inactive_file", facts.get("total_inactive_file", "0")))
