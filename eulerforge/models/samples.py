"""Answers of a model to prompts, always greedy: two models differ in their answers only where the models differ.

The training's before-and-after samples and ``bench`` both come from here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import attrs
import torch


@attrs.frozen(kw_only=True)
class Answer:
    """What a model wrote after a prompt, special tokens left out; ``tokens`` counts all that it generated."""

    text: str
    tokens: int
    seconds: float


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
) -> list[Answer]:
    """Answer prompts (token ids) one by one, up to an end token or ``max_new_tokens``.

    The model's training mode and its cache setting are as before afterwards.
    """
    from transformers import GenerationConfig

    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=pad if pad is not None else (ends[0] if ends else 0),
    )
    training, use_cache = model.training, model.config.use_cache
    own = model.generation_config
    model.eval()
    # generate mixes the checkpoint's own sampling settings into ours unless they are put away
    model.generation_config = settings
    try:
        return [_answer(model, tokenizer, [int(token) for token in prompt], settings) for prompt in prompts]
    finally:
        model.generation_config = own
        model.config.use_cache = use_cache
        model.train(training)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's own and those of the model's generation settings."""
    found: list[int] = []
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    for value in (tokenizer.eos_token_id, own):
        for token in value if isinstance(value, (list, tuple)) else [value]:
            if token is not None and token not in found:
                found.append(int(token))
    return found


def _answer(model: Any, tokenizer: Any, prompt: list[int], settings: Any) -> Answer:
    ids = torch.tensor([prompt], dtype=torch.int64, device=model.device)
    start = time.perf_counter()
    written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    new = written[0, len(prompt) :].tolist()
    return Answer(
        text=tokenizer.decode(new, skip_special_tokens=True).strip(),
        tokens=len(new),
        seconds=time.perf_counter() - start,
    )
