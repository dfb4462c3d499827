"""What a run will take at its peak, part by part, and how a person reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from eulerforge.models.sizes import gib

if TYPE_CHECKING:
    from eulerforge.config.schema import RunConfig

PARTS = {
    "base": "Python, the libraries, the rows",
    "weights": "of the base, and where LoRA lays them out anew",
    "adapters": "",
    "gradients": "",
    "optimizer": "",
    "activations": "kept for the backward pass",
    "loss": "a chunk of logits",
    "workspace": "of the layer that is computed",
    "heap": "freed memory that the C library keeps",
}


@attrs.frozen(kw_only=True)
class Estimate:
    """Bytes by part at the peak of a step; ``load`` is the peak while the weights are read.

    ``base`` is what the process holds before: Python, the libraries, the rows. ``heap`` is what the C library keeps of
    freed memory. ``free`` may still be taken on top of ``base``.
    """

    base: int
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    workspace: int
    heap: int
    load: int
    free: int
    tokens: int

    @property
    def step(self) -> int:
        parts = ("base", "weights", "adapters", "gradients", "optimizer", "activations", "loss", "workspace", "heap")
        return sum(getattr(self, part) for part in parts)

    @property
    def peak(self) -> int:
        return max(self.step, self.load)

    @property
    def fits(self) -> bool:
        return self.peak - self.base <= self.free

    def to_json(self) -> dict[str, int | bool]:
        return {**attrs.asdict(self), "step": self.step, "peak": self.peak, "fits": self.fits}


def estimate_lines(found: Estimate, largest: int, config: RunConfig) -> list[str]:
    """The estimate as a person reads it."""
    lines = [f"memory at the peak of a step, estimated for a micro-batch of {found.tokens:,} tokens"]
    for part, what in PARTS.items():
        size = getattr(found, part)
        if size:
            lines.append(f"  {part:<12} {gib(size):>12}  {what}")
    lines.append(f"  {'step':<12} {gib(found.step):>12}")
    if found.load > found.step:
        lines.append(f"  {'load':<12} {gib(found.load):>12}  while the weights are read, which is more")
    room = found.base + found.free
    lines.append(f"  {'limit':<12} {gib(room):>12}  what this process holds and may still take")
    rows = largest // config.data.max_length
    lines.append(
        f"largest micro-batch that fits: {rows:,} rows of {config.data.max_length} tokens ({largest:,} tokens)"
        if rows
        else f"not even one row of {config.data.max_length} tokens fits"
    )
    return lines
