"""Bytes as a person reads them."""

from __future__ import annotations


def gib(count: float) -> str:
    """1536 MiB as "1.50 GiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
