"""What this machine's processor multiplies in hardware; asked before torch is imported too."""

from __future__ import annotations

from pathlib import Path


def has_bf16_products() -> bool:
    """Whether the processor multiplies bf16 matrices; False where it does not say."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
