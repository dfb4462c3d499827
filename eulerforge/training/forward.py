"""From a batch to its summed loss: the decoder's hidden states, and of them only those whose next token is a label.

Notable: no call builds an attention mask. Padding stands on the right, where a causal query never looks, and packed
documents are kept apart by ``training/attention.py`` or by transformers, which sees positions that begin at 0 again.
No call makes a cache: with one, transformers would not look for documents at all.
Suffixes of tensor names: B rows, T positions, N label tokens, H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch

from eulerforge.data.batches import Batch
from eulerforge.training.attention import NAME, no_mask
from eulerforge.training.loss import soft_capped, summed_cross_entropy


def label_token_loss(model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
    """Summed loss (fp32 scalar, differentiable) of a batch, and how many label tokens it is a sum over."""
    hidden_BTH = hidden_states(model, batch)
    hidden_NH = hidden_BTH.flatten(0, 1).index_select(0, batch.label_at)
    loss = summed_cross_entropy(model.get_output_embeddings(), hidden_NH, batch.next_labels, softcap_of(model))
    return loss, batch.label_tokens


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What the loss takes for the logits of hidden states (..., H); ``training/headcheck.py`` holds it."""
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    return soft_capped(logits, softcap_of(model))


def softcap_of(model: Any) -> float | None:
    """What the model's logits are capped at, softly; None where they are not."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def hidden_states(model: Any, batch: Batch) -> torch.Tensor:
    """The decoder's last hidden states, (B, T, H)."""
    decoder = model.get_decoder()
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": None, "use_cache": False}
    if batch.segments is not None:
        arguments["position_ids"] = batch.position_ids
        arguments["segments"] = batch.segments
        if decoder.config._attn_implementation == NAME:
            arguments["attention_mask"] = no_mask(batch.input_ids.device)
    states: torch.Tensor = decoder(**arguments).last_hidden_state
    return states
