"""Attention per document as matrix products: the CPU's kernel behind ``training/attention.py``.

Notable: the query heads that share a key head are rows of one product, token by token (row n G + g), so keys and values
are never repeated and a block of queries is a view: all products read and write the whole batch's tensors in place. A
block's keys end where its queries do, and only its last columns need the causal mask. What is kept are q, k, v and the
probabilities of documents that are short; the backward pass computes those of longer ones again.
Suffixes of tensor names: N tokens of the whole batch, Q query heads, K key heads, G = Q / K, D head width, M = N x G;
of one block of B tokens R = B x G rows and S keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import attrs
import torch
from torch.autograd.function import once_differentiable

BLOCK = 96
"""Tokens of a block: the scores of a block and its probabilities stay in the cache."""
KEPT_SHARE = 2
"""A document's probabilities are kept if they need at most so many times the memory of its q, k and v."""


def document_products(
    q_NQD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKD: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T, causal within each document) v, (N, Q, D); differentiable once.

    Args:
        lengths: tokens of the documents, which lie one after another; their sum is N.
        window: how many keys a query sees, itself included; None is all before it.
        softcap: the scores become ``softcap * tanh(scores / softcap)`` first.
    """
    out_NQD: torch.Tensor = _PerDocument.apply(q_NQD, k_NKD, v_NKD, lengths, _Scores(scale, window, softcap))
    return out_NQD


class _PerDocument(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_NQD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        lengths: tuple[int, ...],
        scores: _Scores,
    ) -> torch.Tensor:
        k_KND, v_KND = (states.transpose(0, 1).contiguous() for states in (k_NKD, v_NKD))
        q_KMD = _grouped(q_NQD, len(k_KND))
        ctx.scores, ctx.heads = scores, q_NQD.shape[1]
        keeps = any(ctx.needs_input_grad) and scores.softcap is None  # a slope needs the scores themselves
        most = _most_kept(ctx.heads, len(k_KND), q_NQD.shape[2]) if keeps else 0
        ctx.blocks = _blocks(lengths, ctx.heads, len(k_KND), scores.window, BLOCK, most)
        kept = q_KMD.new_empty(_numbers_kept(ctx.blocks))
        out_KMD = torch.empty_like(q_KMD)
        for block in ctx.blocks:
            p_KRS, _ = scores.probabilities(q_KMD, k_KND, block, block.part_of(kept))
            torch.bmm(p_KRS, v_KND[:, block.keys], out=out_KMD[:, block.rows])
        ctx.save_for_backward(q_KMD, k_KND, v_KND, kept)
        return _ungrouped(out_KMD, ctx.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NQD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_KMD, k_KND, v_KND, kept = ctx.saved_tensors
        grad_KMD, dq_KMD = _grouped(grad_NQD, len(k_KND)), torch.empty_like(q_KMD)
        # several blocks add to the gradient of one key
        exact = torch.promote_types(q_KMD.dtype, torch.float32)
        dk_KND, dv_KND = (torch.zeros_like(states, dtype=exact) for states in (k_KND, v_KND))
        for block in ctx.blocks:
            q_KRD, k_KSD, grad_KRD = q_KMD[:, block.rows], k_KND[:, block.keys], grad_KMD[:, block.rows]
            p_KRS, slope_KRS = block.part_of(kept), None
            if p_KRS is None:
                p_KRS, slope_KRS = ctx.scores.probabilities(q_KMD, k_KND, block)
            dv_KND[:, block.keys] += torch.bmm(p_KRS.mT, grad_KRD)
            dp_KRS = torch.bmm(grad_KRD, v_KND[:, block.keys].mT)
            ds_KRS = torch._softmax_backward_data(dp_KRS, p_KRS, -1, p_KRS.dtype)
            if slope_KRS is not None:
                ds_KRS = ds_KRS * slope_KRS
            torch.bmm(ds_KRS, k_KSD, out=dq_KMD[:, block.rows])
            dk_KND[:, block.keys] += torch.bmm(ds_KRS.mT, q_KRD)
        # the scale belongs to D columns here, instead of S
        dq_NQD = _ungrouped(dq_KMD.mul_(ctx.scores.scale), ctx.heads)
        dk_NKD = dk_KND.mul_(ctx.scores.scale).to(k_KND.dtype).transpose(0, 1)
        return dq_NQD, dk_NKD, dv_KND.to(v_KND.dtype).transpose(0, 1), None, None


@attrs.frozen
class _Block:
    """Some tokens: their rows of M, the keys of N that they may see, and where their probabilities are kept, if so."""

    tokens: int
    rows: slice
    keys: slice
    shape: tuple[int, int, int]
    kept: slice | None

    def part_of(self, kept: torch.Tensor) -> torch.Tensor | None:
        return None if self.kept is None else kept[self.kept].view(self.shape)


@lru_cache(maxsize=16)
def _blocks(
    lengths: tuple[int, ...], heads: int, key_heads: int, window: int | None, size: int, most: int
) -> tuple[_Block, ...]:
    """The blocks of every document, of ``size`` tokens; kept are at most ``most`` probabilities per token of one.

    All layers ask for those of the same batch.
    """
    group = heads // key_heads
    blocks: list[_Block] = []
    start = at = 0
    for length in lengths:
        mine = []
        for first in range(start, start + length, size):
            last = min(first + size, start + length)
            low = start if window is None else max(start, first - window + 1)
            mine.append((last - first, slice(first * group, last * group), slice(low, last)))
        shapes = [(key_heads, tokens * group, keys.stop - keys.start) for tokens, _, keys in mine]
        fits = sum(map(math.prod, shapes)) <= most * length
        for (tokens, rows, keys), shape in zip(mine, shapes, strict=True):
            end = at + math.prod(shape) if fits else at
            blocks.append(_Block(tokens, rows, keys, shape, slice(at, end) if end > at else None))
            at = end
        start += length
    return tuple(blocks)


def kept_numbers(documents: Mapping[int, int], heads: int, key_heads: int, width: int, window: int | None) -> int:
    """Probabilities that a layer keeps from its forward to its backward pass, besides q, k and v.

    Args:
        documents: how many there are of each length; what one keeps does not depend on the others.
    """
    most = _most_kept(heads, key_heads, width)
    return sum(
        count * _numbers_kept(_blocks((length,), heads, key_heads, window, BLOCK, most))
        for length, count in documents.items()
    )


def _numbers_kept(blocks: tuple[_Block, ...]) -> int:
    return sum(math.prod(block.shape) for block in blocks if block.kept is not None)


def _most_kept(heads: int, key_heads: int, width: int) -> int:
    """Probabilities per token that a document may keep."""
    return KEPT_SHARE * (heads + 2 * key_heads) * width


@contextmanager
def none_kept() -> Iterator[None]:
    """No probabilities are kept for a while: for who counts what a layer keeps per token, and adds them by itself."""
    global KEPT_SHARE
    share, KEPT_SHARE = KEPT_SHARE, 0
    try:
        yield
    finally:
        KEPT_SHARE = share


class _Scores:
    """From queries and keys of a block to probabilities."""

    def __init__(self, scale: float, window: int | None, softcap: float | None) -> None:
        self.scale, self.window, self.softcap = scale, window, softcap

    def probabilities(
        self, q_KMD: torch.Tensor, k_KND: torch.Tensor, block: _Block, out_KRS: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(K, R, S) of a block, and the slope of the soft-capping where there is one."""
        scale = self.scale if self.softcap is None else self.scale / self.softcap
        q_KRD, k_KSD = q_KMD[:, block.rows], k_KND[:, block.keys]
        s_KRS = torch.baddbmm(q_KRD.new_empty(1), q_KRD, k_KSD.mT, beta=0, alpha=scale)
        slope_KRS = None
        if self.softcap is not None:
            squashed_KRS = s_KRS.tanh_()
            slope_KRS, s_KRS = 1 - squashed_KRS**2, squashed_KRS * self.softcap
        group, keys = block.shape[1] // block.tokens, block.shape[2]
        if self.window is None or keys <= self.window:
            triangle = _kept_mask(BLOCK, BLOCK, None, group, s_KRS.dtype, s_KRS.device)
            s_KRS[:, :, keys - block.tokens :] += triangle[: block.shape[1], : block.tokens]
        else:
            s_KRS += _kept_mask(block.tokens, keys, self.window, group, s_KRS.dtype, s_KRS.device)
        return torch.softmax(s_KRS, -1, out=out_KRS), slope_KRS


def causal_mask(
    rows: int, keys: int, window: int | None, group: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """0 where a query sees a key and -inf elsewhere, (rows * group, keys); the last row stands at the last key."""
    behind = keys - rows
    with torch.inference_mode(False):  # one that evaluation made, and a cache keeps, is used in training too
        seen = torch.ones(rows, keys, dtype=torch.bool, device=device).tril_(behind)
        if window is not None:
            seen = seen.triu_(behind - window + 1)
        mask = torch.zeros(rows, keys, dtype=dtype, device=device).masked_fill_(~seen, -math.inf)
        return mask.repeat_interleave(group, 0)


_kept_mask = lru_cache(maxsize=32)(causal_mask)


def _grouped(x_NQD: torch.Tensor, heads: int) -> torch.Tensor:
    """(N, Q, D) as (K, M, D)."""
    return x_NQD.unflatten(1, (heads, -1)).transpose(0, 1).contiguous().flatten(1, 2)


def _ungrouped(x_KMD: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of ``_grouped``."""
    return x_KMD.unflatten(1, (-1, heads // len(x_KMD))).transpose(0, 1).flatten(1, 2)
