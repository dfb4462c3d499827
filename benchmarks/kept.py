"""Bytes that autograd keeps between forward and backward for each token of each layer, ours beside PEFT's.

Two layers of a Llama of this width with random bf16 weights, adapters of rank 48 on all seven linear layers; what is
counted are the storages that autograd saves, weights left out. Nothing is timed. PEFT's adapters in bf16 keep least,
and lose small updates.

    python benchmarks/kept.py
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import torch

LAYERS, TOKENS, RANK, WORDS = 2, 256, 48, 512
WIDTHS = {  # hidden, MLP, query heads, key heads
    "Llama 3.1 8B": (4096, 14336, 32, 8),
    "Llama 3.2 1B": (2048, 8192, 32, 8),
    "SmolLM2-135M": (576, 1536, 9, 3),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def model_of(name: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, mlp, queries, keys = WIDTHS[name]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_attention_heads=queries, num_key_value_heads=keys,
        num_hidden_layers=LAYERS, vocab_size=WORDS, attn_implementation="sdpa",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def ours(model: Any, dropout: float) -> Any:
    from eulerforge.lora.linear import LoRALinear
    from eulerforge.training.gated import lean_mlps
    from eulerforge.training.norms import quicken_norms

    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name in TARGETS:
                if hasattr(part, name):
                    setattr(part, name, LoRALinear(getattr(part, name), r=RANK, alpha=RANK, dropout=dropout))
    quicken_norms(model)
    lean_mlps(model)
    return model


def peft(model: Any, dropout: float, fp32_adapters: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=dropout, target_modules=list(TARGETS))
    return get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters).base_model.model


def bytes_kept(model: Any, amp: bool) -> float:
    """Per token and layer."""
    from eulerforge.training.memory import KeptForBackward

    ids = torch.randint(0, WORDS, (1, TOKENS))
    model.train()
    model.model(input_ids=ids, use_cache=False)  # weights find their places
    counter = KeptForBackward(model)
    context: Any = torch.autocast("cpu", torch.bfloat16) if amp else contextlib.nullcontext()
    with context, counter.hooks():
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert states.requires_grad
    return counter.bytes / (TOKENS * LAYERS)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| model | dropout | ours | PEFT, bf16 autocast | PEFT, adapters in bf16 |\n| --- | --- | --- | --- | --- |")
    for name in WIDTHS:
        for dropout in (0.0, 0.05):
            own = bytes_kept(ours(model_of(name), dropout), amp=False)
            theirs = [bytes_kept(peft(model_of(name), dropout, fp32), amp=fp32) for fp32 in (True, False)]
            cells = [f"{own / 1e3:.1f} KB", *(f"{other / 1e3:.1f} KB ({own / other:.2f})" for other in theirs)]
            print(f"| {name} | {dropout} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
