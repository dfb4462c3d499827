"""Small tokenizers made here, so that no test needs a download: byte-level BPE with three kinds of chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from eulerforge.config.schema import DataConfig, ValidationConfig

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}"
    "<start_of_turn>model\n{% endif %}"
)
# Like Qwen3: reasoning stands only in the last answer, so earlier turns change when more turns follow.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "Write a short answer to the question, then stop.\n\nAnswer:\n\n",
    "user assistant system model hello world one two three  four\n",
    "question answer think 2 + 2 = 4. Ça va, naïve café, überall 日本語",
]
SPECIALS = [
    "<|im_start|>", "<|im_end|>", "<|begin|>", "<|end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip


def byte_level() -> Tokenizer:
    """Byte-level BPE that splits like GPT-4's, so that line breaks at a border merge."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS * 20,
        trainers.BpeTrainer(
            vocab_size=600,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=SPECIALS,
            show_progress=False,
        ),
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """SentencePiece-like: a space is put before the first word of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = sorted({char for text in CORPUS for char in text.replace(" ", "▁")})
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return tokenizer


def with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    """The same, putting ``bos`` before every text on its own."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def chatml_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML, **kwargs
    )


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=with_bos(byte_level(), "<|begin|>"),
        bos_token="<|begin|>",
        eos_token="<|eot_id|>",
        chat_template=LLAMA3,
    )


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=with_bos(byte_level(), "<bos>"), bos_token="<bos>", eos_token="<eos>", chat_template=GEMMA
    )


def reasoning_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|im_end|>", chat_template=REASONING)


def plain_tokenizer(*, bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """No chat template."""
    special = {"eos_token": "<|end|>"} if eos else {}
    if not bos:
        return PreTrainedTokenizerFast(tokenizer_object=byte_level(), **special)
    return PreTrainedTokenizerFast(
        tokenizer_object=with_bos(byte_level(), "<|begin|>"), bos_token="<|begin|>", **special
    )


def make_config(**keys: Any) -> DataConfig:
    """A data section with defaults, the cache off; ``validation`` is a mapping."""
    validation = ValidationConfig(**keys.pop("validation", {}))
    return DataConfig(**({"cache": False} | keys), validation=validation)


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    """ChatML; the padding token is the EOS token, as in many small models."""
    return chatml_tokenizer()


@pytest.fixture(scope="session")
def llama3() -> PreTrainedTokenizerFast:
    """The template writes the BOS token, and the tokenizer would add one too."""
    return llama3_tokenizer()


@pytest.fixture(scope="session")
def gemma() -> PreTrainedTokenizerFast:
    """The end-of-turn token is not the EOS token; no system role."""
    return gemma_tokenizer()


@pytest.fixture(scope="session")
def reasoning() -> PreTrainedTokenizerFast:
    """Earlier answers are rendered otherwise than the last."""
    return reasoning_tokenizer()


@pytest.fixture(scope="session")
def plain() -> PreTrainedTokenizerFast:
    """No chat template, no BOS."""
    return plain_tokenizer()


@pytest.fixture(scope="session")
def plain_bos() -> PreTrainedTokenizerFast:
    """No chat template; puts a BOS token before every text."""
    return plain_tokenizer(bos=True)


@pytest.fixture(scope="session")
def no_eos() -> PreTrainedTokenizerFast:
    """Neither chat template nor EOS."""
    return plain_tokenizer(eos=False)


@pytest.fixture(scope="session")
def spaced() -> PreTrainedTokenizerFast:
    """Puts a space before the first word of a text."""
    return PreTrainedTokenizerFast(tokenizer_object=metaspace(), eos_token="<|end|>")


@pytest.fixture(scope="session")
def spaced_chatml() -> PreTrainedTokenizerFast:
    """The same with a chat template."""
    return PreTrainedTokenizerFast(tokenizer_object=metaspace(), eos_token="<|im_end|>", chat_template=CHATML)


@pytest.fixture(scope="session")
def stripping() -> PreTrainedTokenizerFast:
    """Special tokens that take the white space behind them along, as Phi-3's do."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken(text, rstrip=True, special=True) for text in ("<|im_end|>", "<bos>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<bos>", chat_template=CHATML
    )


@pytest.fixture(scope="session")
def with_template() -> Callable[[str], PreTrainedTokenizerFast]:
    """A byte-level tokenizer that puts a BOS token before every text, with the given chat template."""

    def make(template: str) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(
            tokenizer_object=with_bos(byte_level(), "<|begin|>"),
            eos_token="<|im_end|>",
            bos_token="<|begin|>",
            chat_template=template,
        )

    return make


@pytest.fixture(scope="session")
def byte_level_json() -> str:
    """The byte-level tokenizer, to be made anew and given tokens of one's own."""
    return byte_level().to_str()


@pytest.fixture(scope="session")
def data_config() -> Callable[..., Any]:
    """A data section with defaults, the cache off."""
    return make_config


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON lines and gives the file's path."""

    def write(rows: Sequence[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
