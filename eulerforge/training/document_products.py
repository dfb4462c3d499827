"""Attention per document as matrix products: the CPU's kernel behind ``training/attention.py``.

Notable: a document's queries go block by block (``training/document_blocks.py``), and each product reads and writes
them where they lie. A block's keys end where its queries do, and only its last columns need the causal mask. What is
kept are q, k, v and the probabilities of documents that are short; the backward pass computes those of longer ones
again. A document that goes on from another one sees that one's keys before its own.
Suffixes of tensor names: N tokens of the whole batch, Q query heads, K key heads, G = Q / K, D head width, M = N x Q,
P = N x K; of one document T keys; of one block of B tokens R = B x G rows and S keys.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from eulerforge.models.room import room
from eulerforge.training import document_blocks
from eulerforge.training.document_blocks import Block, Borders, documents_of, most_kept, numbers_kept, orders_of

LANES = 32
"""torch's softmax in half precision takes keys beyond the last whole 32 one by one: 120 take twice as long as 96."""
MOST_WIDE = 448
"""Keys up to which a softmax in fp32, rounded afterwards, is faster than that; what more take leaves the cache."""


@torch.compiler.disable  # its loop over documents would be compiled anew for every batch
def document_products(
    q_NQD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKD: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    after: tuple[int | None, ...] = (),
) -> torch.Tensor:
    """softmax(scale q k^T, causal within each document) v, (N, Q, D); differentiable once.

    Args:
        lengths: tokens of the documents, which lie one after another; their sum is N.
        after: the number of the document from which each goes on, an earlier one that goes on from none; or None.
        window: how many keys a query sees, itself included; None is all before it.
        softcap: the scores become ``softcap * tanh(scores / softcap)`` first.
    """
    out_NQD: torch.Tensor = _PerDocument.apply(q_NQD, k_NKD, v_NKD, (lengths, after), _Scores(scale, window, softcap))
    return out_NQD


class _PerDocument(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_NQD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, borders: Borders, scores: _Scores
    ) -> torch.Tensor:
        heads, key_heads, width = q_NQD.shape[1], *k_NKD.shape[1:]
        ctx.scores, ctx.heads = scores, (heads, key_heads)
        size = document_blocks.BLOCK
        keeps = any(ctx.needs_input_grad) and scores.softcap is None  # a slope needs the scores themselves
        most = most_kept(heads, key_heads, width) if keeps else 0
        ctx.documents = documents_of(borders, heads, key_heads, scores.window, size, most)
        ctx.orders = by_block, by_document = orders_of(borders[0], heads, key_heads, size, q_NQD.device)
        q_MD, k_PD, v_PD = by_block.of(q_NQD), by_document.of(k_NKD), by_document.of(v_NKD)
        kept = q_MD.new_empty(numbers_kept(ctx.documents))
        out_MD = torch.empty_like(q_MD)
        for document in ctx.documents:
            k_KTD, v_KTD = document.keys_of(k_PD), document.keys_of(v_PD)
            for block in document.blocks:
                p_KRS, _ = scores.probabilities(block.of(q_MD), k_KTD, block, block.part_of(kept))
                torch.bmm(p_KRS, v_KTD[:, block.keys], out=block.of(out_MD))
        ctx.save_for_backward(q_MD, k_PD, v_PD, kept)
        return by_block.undone(out_MD, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NQD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_MD, k_PD, v_PD, kept = ctx.saved_tensors
        scores, (by_block, by_document), (heads, key_heads) = ctx.scores, ctx.orders, ctx.heads
        grad_MD, dq_MD = by_block.of(grad_NQD), torch.empty_like(q_MD)
        # several blocks, and documents that go on from one, add to the gradient of one key
        exact = torch.promote_types(q_MD.dtype, torch.float32)
        dk_PD, dv_PD = (torch.empty_like(states, dtype=exact) for states in (k_PD, v_PD))
        for document in ctx.documents:
            k_KTD, v_KTD = document.keys_of(k_PD), document.keys_of(v_PD)
            dk_KTD, dv_KTD = document.sums_in(dk_PD), document.sums_in(dv_PD)
            for block in reversed(document.blocks):
                q_KRD, grad_KRD, k_KSD = block.of(q_MD), block.of(grad_MD), k_KTD[:, block.keys]
                p_KRS, slope_KRS = block.part_of(kept), None
                if p_KRS is None:
                    p_KRS, slope_KRS = scores.probabilities(q_KRD, k_KTD, block)
                block.add(dv_KTD, torch.bmm(p_KRS.mT, grad_KRD))
                dp_KRS = torch.bmm(grad_KRD, _tight(v_KTD[:, block.keys]).mT)
                ds_KRS = torch._softmax_backward_data(dp_KRS, p_KRS, -1, p_KRS.dtype)
                if slope_KRS is not None:
                    ds_KRS = ds_KRS * slope_KRS
                # the scale belongs to D columns here, instead of S
                torch.bmm(ds_KRS, k_KSD, out=block.of(dq_MD)).mul_(scores.scale)
                block.add(dk_KTD, torch.bmm(ds_KRS.mT, q_KRD))
            document.add_sums(dk_PD, dk_KTD)
            document.add_sums(dv_PD, dv_KTD)
        dk_NKD = by_document.undone(dk_PD.mul_(scores.scale).to(k_PD.dtype), key_heads)
        dv_NKD = by_document.undone(dv_PD.to(v_PD.dtype), key_heads)
        return by_block.undone(dq_MD, heads), dk_NKD, dv_NKD, None, None


def _tight(x_KSD: torch.Tensor) -> torch.Tensor:
    """Without gaps: this copy is cheaper than the transposed one that a product with gaps would make."""
    return x_KSD.contiguous()


class _Scores:
    """From queries and keys of a block to probabilities."""

    def __init__(self, scale: float, window: int | None, softcap: float | None) -> None:
        self.scale, self.window, self.softcap = scale, window, softcap

    def probabilities(
        self, q_KRD: torch.Tensor, k_KTD: torch.Tensor, block: Block, out_KRS: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(K, R, S) of a block, and the slope of the soft-capping where there is one."""
        scale = self.scale if self.softcap is None else self.scale / self.softcap
        k_KSD = _tight(k_KTD[:, block.keys])
        s_KRS = torch.baddbmm(q_KRD.new_empty(1), q_KRD, k_KSD.mT, beta=0, alpha=scale)
        slope_KRS = None
        if self.softcap is not None:
            squashed_KRS = s_KRS.tanh_()
            slope_KRS, s_KRS = 1 - squashed_KRS**2, squashed_KRS * self.softcap
        group, keys = block.shape[1] // block.tokens, block.shape[2]
        if self.window is None or keys <= self.window:
            side = document_blocks.BLOCK
            triangle = _kept_mask(side, side, None, group, s_KRS.dtype, s_KRS.device)
            s_KRS[:, :, keys - block.tokens :] += triangle[: block.shape[1], : block.tokens]
        else:
            s_KRS += _kept_mask(block.tokens, keys, self.window, group, s_KRS.dtype, s_KRS.device)
        return _softmax(s_KRS, out_KRS), slope_KRS


def _softmax(s_KRS: torch.Tensor, out_KRS: torch.Tensor | None) -> torch.Tensor:
    keys = s_KRS.shape[-1]
    if s_KRS.dtype not in (torch.bfloat16, torch.float16) or keys % LANES == 0 or keys > MOST_WIDE:
        return torch.softmax(s_KRS, -1, out=out_KRS)
    wide_KRS = room("probabilities", s_KRS.shape, s_KRS.new_empty(0, dtype=torch.float32))
    torch.softmax(s_KRS, -1, dtype=torch.float32, out=wide_KRS)
    return wide_KRS.to(s_KRS.dtype) if out_KRS is None else out_KRS.copy_(wide_KRS)


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
