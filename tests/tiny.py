"""Tiny random models of real architectures, and a tokenizer made on the spot: no hub, no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 128
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_config(family: str, **changes: Any) -> Any:
    """A config of ``llama`` or ``qwen3`` with 3 layers of width 32."""
    from transformers import LlamaConfig, Qwen3Config

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }
    return {"llama": LlamaConfig, "qwen3": Qwen3Config}[family](**sizes)


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """An fp32 model with random weights, in eval mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32).eval()


def tiny_tokenizer(chat_template: str | None = CHATML) -> Any:
    """A byte-level tokenizer with the special tokens of ChatML; every printable ASCII character is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    vocabulary = {token: index for index, token in enumerate(special + letters)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def save_tiny(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A model folder in the Hugging Face format, tokenizer included."""
    tiny_model(family, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


QUESTIONS = [
    ("What is a beam?", "A beam carries load across a span."),
    ("Who builds?", "The builder."),
    ("Why?", "Because the law says so, and the plan too."),
    ("What is a permit?", "A permit lets you build a house on your land."),
]


def write_rows(path: Path, count: int = 24) -> Path:
    """A JSONL file of prompt/response rows."""
    import json

    rows = [QUESTIONS[index % len(QUESTIONS)] for index in range(count)]
    text = "".join(
        json.dumps({"prompt": f"{question} ({index})", "response": answer}) + "\n"
        for index, (question, answer) in enumerate(rows)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
