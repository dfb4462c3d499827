"""The loss: summed cross entropy over the label tokens, and nothing computed for the others.

Notable: the head's product, the softmax and the gradient of the hidden states happen in one pass, chunk by chunk, and
a chunk's logits turn into their own gradient where they lie. So the loss needs ``CHUNK_BYTES`` and no more, whatever
the vocabulary and however many tokens: fp32 logits of 2048 tokens at a vocabulary of 248,320 are 2 GB, more than many
a base model. The slow reference beside it in the tests is ``F.cross_entropy(head(hidden).float())``.
Suffixes of tensor names: N label tokens, C of them in a chunk, K in a block, H hidden width, V vocabulary, W of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from eulerforge.data.packing import CPU_STEP
from eulerforge.models.hooks import is_hooked
from eulerforge.models.room import room

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Logits of a chunk, in the head's precision. A GPU needs more rows at once before its product is fast."""
BLOCK_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""fp32 numbers of a block. On the CPU softmax and gradient of these stay in the cache; on a GPU 256 MiB each are enough
for its kernels, and a soft-cap has four such tensors at once."""
COLUMNS = 2048
"""Logits of a row that one product makes on the CPU; wider ones leave the cache before the product is done."""


def summed_cross_entropy(
    head: nn.Module, hidden_NH: torch.Tensor, labels_N: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """Sum over N of -log p(label), fp32 (float64 from float64 states); differentiable once.

    Args:
        head: hidden states to logits. A plain ``nn.Linear`` takes the one-pass way; any other module (quantized,
            hooked, adapted) is called as it is and its logits are computed again in the backward pass.
        hidden_NH: the hidden states of the label tokens alone.
        labels_N: int64 ids below the vocabulary size.
        softcap: the logits are ``soft_capped`` first.
    """
    if is_plain(head, hidden_NH):
        loss: torch.Tensor = _LinearCrossEntropy.apply(hidden_NH, head.weight, head.bias, labels_N, softcap)
        return loss
    total = hidden_NH.new_zeros((), dtype=torch.promote_types(hidden_NH.dtype, torch.float32))
    # the logits of the checkpoint, their fp32 copy and its gradient are all there at once
    chunk = chunk_rows(_vocabulary(head, hidden_NH), 12, hidden_NH.device)
    for start in range(0, len(labels_N), chunk):
        part_CH, part_C = hidden_NH[start : start + chunk], labels_N[start : start + chunk]
        total = total + checkpoint(_chunk_loss, head, part_CH, part_C, softcap, use_reentrant=False)
    return total


def is_plain(head: nn.Module, hidden_NH: torch.Tensor) -> bool:
    """Whether the head computes exactly ``hidden @ weight.T + bias``, in the precision of the hidden states."""
    if type(head).forward is not nn.Linear.forward or torch.is_autocast_enabled(hidden_NH.device.type):
        return False
    replaced = "forward" in vars(head)
    return not is_hooked(head) and not replaced and head.weight.dtype == hidden_NH.dtype  # type: ignore[union-attr]


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in the forward pass; the backward pass multiplies them by the gradient of the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        softcap: float | None,
    ) -> torch.Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        exact = torch.promote_types(hidden_NH.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden_NH.device)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=exact) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=exact) if wants_bias and bias_V is not None else None
        count, vocabulary = len(labels_N), len(weight_VH)
        on_cpu = hidden_NH.device.type == "cpu"
        states_NH = F.pad(hidden_NH, (0, 0, 0, -count % CPU_STEP)) if on_cpu else hidden_NH
        grad_hidden_NH = torch.empty_like(states_NH, memory_format=torch.contiguous_format) if wants_hidden else None
        chunk = chunk_rows(vocabulary, hidden_NH.element_size(), hidden_NH.device)
        room_CV = room("logits", (min(chunk, len(states_NH)), vocabulary), hidden_NH)
        width = COLUMNS if on_cpu else vocabulary
        for start in range(0, count, chunk):
            part_CH, labels_C = states_NH[start : start + chunk], labels_N[start : start + chunk]
            logits_CV = room_CV[: len(part_CH)]
            for low in range(0, vocabulary, width):
                weight_WH, logits_CW = weight_VH[low : low + width], logits_CV[:, low : low + width]
                if bias_V is None:
                    torch.mm(part_CH, weight_WH.T, out=logits_CW)
                else:
                    torch.addmm(bias_V[low : low + width], part_CH, weight_WH.T, out=logits_CW)
            real_CV = logits_CV[: len(labels_C)]
            total += _loss_and_gradient_in_place(real_CV, labels_C, softcap, exact, any(ctx.needs_input_grad))
            if grad_hidden_NH is not None:
                torch.mm(logits_CV, weight_VH, out=grad_hidden_NH[start : start + chunk])
            if grad_weight_VH is not None:
                grad_weight_VH += logits_CV.T @ part_CH
            if grad_bias_V is not None:
                grad_bias_V += real_CV.sum(0, dtype=exact)
        if grad_hidden_NH is not None:
            grad_hidden_NH = grad_hidden_NH[:count]
        ctx.save_for_backward(grad_hidden_NH, grad_weight_VH, grad_bias_V)
        ctx.dtypes = weight_VH.dtype, bias_V.dtype if bias_V is not None else None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grad_hidden_NH, grad_weight_VH, grad_bias_V = ctx.saved_tensors
        return (
            # a number of fp32 on the CPU, though the states are bf16: rounded, it would scale all gradients
            grad_hidden_NH * grad if grad_hidden_NH is not None else None,
            (grad_weight_VH * grad).to(ctx.dtypes[0]) if grad_weight_VH is not None else None,
            (grad_bias_V * grad).to(ctx.dtypes[1]) if grad_bias_V is not None else None,
            None,
            None,
        )


def _loss_and_gradient_in_place(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, softcap: float | None, exact: torch.dtype, wants_gradient: bool
) -> torch.Tensor:
    """The chunk's summed loss; with ``wants_gradient`` its gradient overwrites the logits. Sums are in ``exact``."""
    rows, vocabulary = logits_CV.shape
    block = block_rows(vocabulary, logits_CV.device)
    total = torch.zeros((), dtype=exact, device=logits_CV.device)
    room_KV = torch.empty(min(block, rows), vocabulary, dtype=exact, device=logits_CV.device)
    for start in range(0, rows, block):
        logits_KV, labels_K1 = logits_CV[start : start + block], labels_C[start : start + block, None]
        capped_KV, slope_KV = logits_KV, None
        if softcap is not None:
            squashed_KV = logits_KV.to(exact).div_(softcap).tanh_()
            slope_KV = 1 - squashed_KV.square() if wants_gradient else None
            capped_KV = squashed_KV.mul_(softcap)
        p_KV = torch.softmax(capped_KV, -1, dtype=exact, out=room_KV[: len(logits_KV)])
        # the largest probability is never too small for its logarithm; the label's may be
        norm_K1 = capped_KV.amax(1, keepdim=True).to(exact) - p_KV.amax(1, keepdim=True).log_()
        total += (norm_K1 - capped_KV.gather(1, labels_K1)).sum()
        if wants_gradient:
            p_KV[torch.arange(len(p_KV), device=p_KV.device), labels_K1[:, 0]] -= 1
            if slope_KV is not None:
                p_KV.mul_(slope_KV)
            logits_KV.copy_(p_KV)
    return total


def _chunk_loss(
    head: nn.Module, hidden_CH: torch.Tensor, labels_C: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    logits_CV = head(hidden_CH)
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return F.cross_entropy(soft_capped(logits_CV, softcap), labels_C, reduction="sum")


def soft_capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """``softcap * tanh(logits / softcap)``; the logits as they are without a cap."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def block_rows(vocabulary: int, device: torch.device) -> int:
    """Rows whose logits are there in fp32 at once."""
    return max(1, BLOCK_NUMBERS["cpu" if device.type == "cpu" else "cuda"] // vocabulary)


def chunk_rows(vocabulary: int, bytes_each: int, device: torch.device) -> int:
    """Rows whose logits are there at once."""
    budget = CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"]
    rows = max(1, budget // (bytes_each * vocabulary))
    return rows // CPU_STEP * CPU_STEP or rows


@torch.no_grad()
def _vocabulary(head: nn.Module, hidden_NH: torch.Tensor) -> int:
    """Logits of one row; a quantized head's weight has another shape."""
    features = getattr(head, "out_features", None)
    return int(features) if features is not None else int(head(hidden_NH.new_zeros(1, hidden_NH.shape[1])).shape[-1])
