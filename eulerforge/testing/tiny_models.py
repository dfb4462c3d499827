"""Tiny random models of every family, text, multimodal and mixture, and a tokenizer made on the spot: no download.

A text model is 32 wide and 3 or 4 layers deep; a hybrid has both kinds of layers, a mixture 4 experts of which 2 work.
Every model is a plain transformers model that ``save_pretrained`` writes and ``from_pretrained`` reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import torch

VOCABULARY = 128
PAD, BOS, EOS = 0, 1, 2
IMAGE, VIDEO, VISION_START, VISION_END = 124, 125, 126, 127
"""Tokens that only the multimodal models give a meaning; the tokenizer never writes them."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_ATTENTION: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_DENSE = {**_ATTENTION, "intermediate_size": 48}
_MIXTURE = {**_ATTENTION, "num_experts_per_tok": 2}
_HYBRID: dict[str, Any] = {
    "num_hidden_layers": 4,
    # two and two, so that every kind of layer has one that is not the first
    "full_attention_interval": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
}
_GEMMA = {
    **_DENSE,
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 8,
    # shorter than the tests' rows, so that a sliding layer differs from a full one
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "tie_word_embeddings": True,
}
_QWEN_SPECIAL = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
}


@attrs.frozen(kw_only=True)
class _Family:
    """The names of a config class and a model class of transformers, and the sizes of the language part.

    ``vision`` is None for a text model; ``own`` are the keys of a multimodal config itself.
    """

    config: str
    model: str
    sizes: dict[str, Any]
    vision: dict[str, Any] | None = None
    own: dict[str, Any] = attrs.field(factory=dict)


_QWEN3_5 = {**_DENSE, **_HYBRID}
_QWEN3_5_MOE = {
    **_MIXTURE,
    **_HYBRID,
    "num_experts": 4,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}

_FAMILIES = {
    "llama3": _Family(config="LlamaConfig", model="LlamaForCausalLM", sizes=_DENSE),
    "qwen3": _Family(config="Qwen3Config", model="Qwen3ForCausalLM", sizes=_DENSE),
    "qwen3_moe": _Family(
        config="Qwen3MoeConfig",
        model="Qwen3MoeForCausalLM",
        # the first layer is dense: a mixture may mix both
        sizes={**_DENSE, **_MIXTURE, "num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": [0]},
    ),
    "qwen3_5": _Family(config="Qwen3_5TextConfig", model="Qwen3_5ForCausalLM", sizes=_QWEN3_5),
    "qwen3_5_moe": _Family(config="Qwen3_5MoeTextConfig", model="Qwen3_5MoeForCausalLM", sizes=_QWEN3_5_MOE),
    "qwen3_5_multimodal": _Family(
        config="Qwen3_5Config",
        model="Qwen3_5ForConditionalGeneration",
        sizes=_QWEN3_5,
        vision=_QWEN_VISION,
        own=_QWEN_SPECIAL,
    ),
    "qwen3_5_moe_multimodal": _Family(
        config="Qwen3_5MoeConfig",
        model="Qwen3_5MoeForConditionalGeneration",
        sizes=_QWEN3_5_MOE,
        vision=_QWEN_VISION,
        own=_QWEN_SPECIAL,
    ),
    "gemma3": _Family(config="Gemma3TextConfig", model="Gemma3ForCausalLM", sizes=_GEMMA),
    "gemma3_multimodal": _Family(
        config="Gemma3Config",
        model="Gemma3ForConditionalGeneration",
        sizes=_GEMMA,
        vision=_SIGLIP,
        own={
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": VISION_START,
            "eoi_token_index": VISION_END,
        },
    ),
    "mixtral": _Family(
        config="MixtralConfig",
        model="MixtralForCausalLM",
        sizes={**_MIXTURE, "intermediate_size": 48, "num_local_experts": 4},
    ),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""The names that ``tiny_config``, ``tiny_model`` and ``save_tiny`` take."""


def tiny_config(family: str, **changes: Any) -> Any:
    """The config of a family with small sizes; ``changes`` go to the language part of a multimodal one.

    Raises:
        KeyError: ``family`` is not in ``FAMILIES``.
    """
    import transformers

    made = _FAMILIES[family]
    config_class = getattr(transformers, made.config)
    sizes = {**made.sizes, **changes}
    if made.vision is None:
        return config_class(**sizes)
    tied = sizes["tie_word_embeddings"]
    return config_class(text_config=sizes, vision_config=dict(made.vision), tie_word_embeddings=tied, **made.own)


def tiny_model(family: str = "llama3", seed: int = 0, **changes: Any) -> Any:
    """An fp32 model on the CPU with random weights, in eval mode, of the family's own class."""
    import transformers

    torch.manual_seed(seed)
    return getattr(transformers, _FAMILIES[family].model)(tiny_config(family, **changes)).float().eval()


def tiny_model_of(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """As ``tiny_model``, for any ``config.model_type`` that transformers knows, in our families or not.

    A family that is not ours gets the sizes of a dense one; ``changes`` are keys of its config.

    Raises:
        ValueError: transformers does not know ``model_type``, or its config does not take the sizes.
    """
    import transformers

    for family, made in _FAMILIES.items():
        if getattr(transformers, made.config).model_type == model_type:
            return tiny_model(family, seed, **changes)
    config = transformers.AutoConfig.for_model(model_type, **{**_DENSE, **changes})
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


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


def save_tiny(folder: Path, family: str = "llama3", *, seed: int = 0, **changes: Any) -> Path:
    """A model folder in the Hugging Face format, tokenizer included."""
    tiny_model(family, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
