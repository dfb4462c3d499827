"""Greedy answers, against a loop of whole forward passes without a cache."""

from __future__ import annotations

import pytest
import tiny
import torch

from eulerforge.models.samples import end_tokens, generate_answers


def reference(model: torch.nn.Module, prompt: list[int], ends: list[int], limit: int) -> list[int]:
    """Greedy decoding without a cache."""
    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_answers_are_greedy_and_leave_the_model_as_it_was(family: str) -> None:
    model, tokenizer = tiny.tiny_model(family), tiny.tiny_tokenizer()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.config.use_cache = False
    model.train()
    prompts = [[1, 40, 41, 42], [1, 90]]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=6)
    assert model.training
    assert model.config.use_cache is False
    assert model.generation_config.temperature == 5.0
    model.eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        want = reference(model, prompt, end_tokens(model, tokenizer), 6)
        assert answer.tokens == len(want)
        assert answer.text == tokenizer.decode(want, skip_special_tokens=True).strip()


def test_an_answer_ends_at_the_tokenizer_s_and_at_the_model_s_own_end() -> None:
    model, tokenizer = tiny.tiny_model(), tiny.tiny_tokenizer()
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id, 2]
    first = reference(model, [1, 40], [], 1)[0]
    model.generation_config.eos_token_id = [first]
    assert generate_answers(model, tokenizer, [[1, 40]], max_new_tokens=6)[0].tokens == 1
