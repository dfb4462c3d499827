"""Attention per document with torch's flex_attention: on CUDA, for the calls that no variable-length kernel takes.

Notable: a query's visible keys are one interval, from ``first`` of its position to itself. Documents, causality and the
sliding window are all in that one tensor, so every mask is the same code and one compiled kernel serves all lines,
documents and windows; scale and soft-cap are tensors for the same reason (a number of Python's that changes would be
compiled in, or refused). What still compiles anew is said at ``RECOMPILES``. The table of blocks comes from ``first``
too: torch's own way to it fills a mask of tokens x tokens.
Suffixes of tensor names: N tokens of the whole batch, Q query heads, K key heads, D head width, B blocks of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from eulerforge.data.packing import Segments
from eulerforge.training.document_products import document_products

BLOCK = 128
"""Tokens of a block of the mask, torch's own choice: what its kernels' tiles divide."""
BACKEND = "inductor"
"""What compiles; the tests put one here that needs no GPU."""
RECOMPILES = 64
"""How often the kernel may be compiled in a process, instead of torch's 8: once for each combination of which of q, k
and v need a gradient, of lines up to one block and longer ones, of capped scores and plain ones, and of the models'
head counts, widths and precisions; and once more if the number of blocks happened to be one of those counts, which
torch takes for one number. Past it torch stops with an error."""
PROBE_LENGTHS, PROBE_WINDOW, PROBE_SOFTCAP = (1, 500, 130, 700), 300, 20.0
"""Eleven blocks, which no model has heads."""
PROBE_TOLERANCE = 2e-2
"""Relative error of the norm: far above rounding (TF32 and bf16 too), far below what a wrong mask does."""


def flex_documents(
    q_NQD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKD: torch.Tensor,
    segments: Segments,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T, causal within each document) v, (N, Q, D).

    Args:
        window: how many keys a query sees, itself included; None is all before it.
        softcap: the scores become ``softcap * tanh(scores / softcap)`` first.
    """
    mask = _once(segments, ("flex mask", window), lambda: block_mask(first_keys(segments, window)))
    exact = torch.promote_types(q_NQD.dtype, torch.float32)
    scores = _once(
        segments, ("flex scores", scale, softcap, exact), lambda: _scores(scale, softcap, exact, q_NQD.device)
    )
    states = (tensor.transpose(0, 1)[None] for tensor in (q_NQD, k_NKD, v_NKD))
    with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
        out: torch.Tensor = _compiled(BACKEND)(*states, mask, scores)
    return out[0].transpose(0, 1)


def first_keys(segments: Segments, window: int | None = None) -> torch.Tensor:
    """The position of the first key that each query sees, (N,) int32; it never goes back from one query to the next."""
    first_N = segments.cu_seqlens[segments.document_of.flatten()]
    if window is None:
        return first_N
    positions_N = torch.arange(len(first_N), dtype=torch.int32, device=first_N.device)
    return torch.maximum(first_N, positions_N - (window - 1))


def block_mask(first_N: torch.Tensor) -> BlockMask:
    """Which blocks of keys a block of queries sees in part, and which wholly.

    The intervals of a block's queries overlap or touch, so together they are one interval: from its first query's
    first key to its last query. Wholly seen is what lies behind its last query's first key and before its first query.
    """
    tokens = len(first_N)
    begin_B = torch.arange(0, tokens, BLOCK, device=first_N.device)
    last_B = (begin_B + BLOCK - 1).clamp_(max=tokens - 1)
    seen_BB = (first_N[begin_B][:, None] <= last_B) & (begin_B <= last_B[:, None])
    wholly_BB = (first_N[last_B][:, None] <= begin_B) & (last_B <= begin_B[:, None])
    wholly_BB[-1] &= tokens % BLOCK == 0  # the kernels guard the rows behind the end of a block seen in part

    def mask_mod(_batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (first_N[query] <= key) & (key <= query)

    return BlockMask.from_kv_blocks(
        *_ordered(seen_BB & ~wholly_BB), *_ordered(wholly_BB), BLOCK, mask_mod, seq_lengths=(tokens, tokens)
    )


def _ordered(dense_BB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of True per row, (1, 1, B), and their columns before the others, (1, 1, B, B)."""
    columns_BB = dense_BB.byte().argsort(dim=-1, descending=True, stable=True)
    return dense_BB.sum(-1, dtype=torch.int32)[None, None], columns_BB.int()[None, None]


_ScoreMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _scores(scale: float, softcap: float | None, dtype: torch.dtype, device: torch.device) -> _ScoreMod:
    factor = torch.full((), scale / (softcap or 1.0), dtype=dtype, device=device)
    if softcap is None:
        return lambda score, batch, head, query, key: score * factor
    cap = torch.full((), softcap, dtype=dtype, device=device)
    return lambda score, batch, head, query, key: cap * torch.tanh(score * factor)


def _once(segments: Segments, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """All layers ask for the same; it is kept with the batch, and goes when the batch goes."""
    if key not in segments.made:
        segments.made[key] = make()
    return segments.made[key]


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, score_mod: _ScoreMod
) -> torch.Tensor:
    # not the kernel for decoding, which short lines would get otherwise
    return flex_attention(query, key, value, score_mod, mask, 1.0, True, kernel_options={"BACKEND": "TRITON"})


@cache
def _compiled(backend: str) -> Callable[..., torch.Tensor]:
    # without fullgraph a kernel that does not compile would compute all scores at once, in silence
    return torch.compile(_attend, backend=backend, dynamic=True, fullgraph=True)


@cache
def refusal(device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], capped: bool = False) -> str:
    """Why the kernel cannot be used, empty when it can: it is compiled, run in both directions and held against the
    matrix products, once for each combination.

    Args:
        heads: query heads, key heads and their width.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            error = _probe(device, dtype, heads, PROBE_SOFTCAP if capped else None)
    except Exception as problem:  # noqa: BLE001 - compilers and drivers raise types of their own; the run says which
        return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    return "" if error <= PROBE_TOLERANCE else f"its result is wrong by {error:.2g}"


def _probe(device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], softcap: float | None) -> float:
    """The largest relative error of output and gradients; NaN if one of them is."""
    queries, keys, width = heads
    tokens, scale = sum(PROBE_LENGTHS), width**-0.5
    generator = torch.Generator().manual_seed(0)  # the run's own draws stay as they are
    drawn = [torch.randn(tokens, count, width, generator=generator) for count in (queries, keys, keys, queries)]
    q_NQD, k_NKD, v_NKD, upstream = (tensor.to(device, dtype).requires_grad_() for tensor in drawn)
    inputs = (q_NQD, k_NKD, v_NKD)
    segments = Segments(lengths=PROBE_LENGTHS, shape=(1, tokens), device=device)
    out = flex_documents(*inputs, segments, scale, PROBE_WINDOW, softcap)
    wanted = document_products(q_NQD.float(), k_NKD.float(), v_NKD.float(), PROBE_LENGTHS, scale, PROBE_WINDOW, softcap)
    found = (out, *torch.autograd.grad(out, inputs, upstream))
    true = (wanted, *torch.autograd.grad(wanted, inputs, upstream.float()))
    errors = [_error(ours.detach(), theirs.detach()) for ours, theirs in zip(found, true, strict=True)]
    return float(torch.stack(errors).max())


def _error(found: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    return (found.double() - true.double()).norm() / true.double().norm()
