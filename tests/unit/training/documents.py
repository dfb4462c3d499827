"""Attention per document in its plainest form, and the borders that it is given."""

from __future__ import annotations

import math

import torch

from eulerforge.data.packing import Segments


def segments(lengths: tuple[int, ...], lines: int = 1, after: tuple[int | None, ...] = ()) -> Segments:
    return Segments(lengths=lengths, shape=(lines, sum(lengths) // lines), device=torch.device("cpu"), after=after)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
    after: tuple[int | None, ...] = (),
) -> torch.Tensor:
    """One document at a time, the whole score matrix, keys and values repeated: (1, tokens, heads, width)."""
    out, parts = [], []
    repeats = query.shape[1] // key.shape[1]
    for number, own in enumerate(torch.arange(sum(lengths)).split(list(lengths))):
        parts.append(own)
        before = after[number] if after else None
        # those before it are computed again with each document that goes on from them
        part = own if before is None else torch.cat([parts[before], own])
        q, k, v = query[:, :, part], key[:, :, part], value[:, :, part]
        length = len(part)
        scores = q @ k.repeat_interleave(repeats, 1).mT * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        seen = (distance >= 0) & (distance < (window or length))
        scores = scores.masked_fill(~seen, -math.inf)
        out.append((torch.softmax(scores, -1) @ v.repeat_interleave(repeats, 1))[:, :, length - len(own) :])
    return torch.cat(out, 2).transpose(1, 2)
