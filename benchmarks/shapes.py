"""Models of a real shape with random weights, for machines without a hub: the cost of a step is the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    # no real model's: a step of it takes a second or two, for measurements of many shapes around one
    "small-llama": {
        "model_type": "llama",
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}


def random_model(shape: str, folder: Path, **changes: Any) -> Path:
    """A bf16 model folder of this shape, with a tokenizer of as many words."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    facts = {"max_position_embeddings": 32768, **SHAPES[shape], **changes}
    config = AutoConfig.for_model(**facts)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    names = {f"t{index}": index for index in range(config.vocab_size)}
    words = Tokenizer(models.WordLevel(names, unk_token="t2"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1").save_pretrained(folder)
    return folder


def random_rows(vocabulary: int, count: int, seed: int, full: int | None = None) -> list[dict[str, list[int]]]:
    """Random ids: lengths like those of the real rows (about 215 tokens, heavy tail), or ``full`` tokens each."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        length = full or min(4096, 20 + int(65 * min(12, 1 + int(draw.paretovariate(1.3)))) + draw.randrange(40))
        prompt = 0 if full else min(length - 4, 30 + length // 8)
        ids = [draw.randrange(3, vocabulary) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows
