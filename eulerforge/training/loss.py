"""The loss: summed cross entropy over the label tokens, and nothing computed for the others.

Notable: only positions whose next token is a label go through the output embedding, and when their logits would be
large they go in chunks that are computed again in the backward pass. The logits of 2048 tokens at a vocabulary of
248,320 are 2 GB in fp32, more than many a base model.
Suffixes of tensor names: B rows, T positions, N label tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from eulerforge.data.batches import Batch

IGNORED = -100
LOGIT_BYTES = 256 << 20
"""fp32 logits above this size are cut into chunks."""


def label_token_loss(model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
    """Summed loss (fp32 scalar, differentiable) of a right-padded batch, and how many label tokens it is a sum over."""
    hidden_BTH = model.get_decoder()(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    next_labels_BT = batch.labels[:, 1:]
    is_label_BT = next_labels_BT != IGNORED
    hidden_NH = hidden_BTH[:, :-1][is_label_BT]
    labels_N = next_labels_BT[is_label_BT]
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return summed_cross_entropy(model.get_output_embeddings(), hidden_NH, labels_N, softcap), len(labels_N)


def summed_cross_entropy(
    head: nn.Module, hidden_NH: torch.Tensor, labels_N: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """Sum over N of -log p(label), from fp32 logits that are never all there at once when they are large."""
    vocabulary = int(head.weight.shape[0])  # type: ignore[union-attr, index]
    chunk = max(1, LOGIT_BYTES // (4 * vocabulary))
    if len(labels_N) <= chunk:
        return _chunk_loss(head, hidden_NH, labels_N, softcap)
    total = hidden_NH.new_zeros((), dtype=torch.float32)
    for start in range(0, len(labels_N), chunk):
        part_CH, part_C = hidden_NH[start : start + chunk], labels_N[start : start + chunk]
        total = total + checkpoint(
            _chunk_loss, head, part_CH, part_C, softcap, use_reentrant=False, preserve_rng_state=False
        )
    return total


def _chunk_loss(
    head: nn.Module, hidden_CH: torch.Tensor, labels_C: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    logits_CV = head(hidden_CH).float()
    if softcap is not None:
        logits_CV = torch.tanh(logits_CV / softcap) * softcap
    return F.cross_entropy(logits_CV, labels_C, reduction="sum")
