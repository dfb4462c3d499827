"""The tiny models of ``eulerforge.testing`` under the names that the tests use, and rows to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eulerforge.testing import tiny_models
from eulerforge.testing.tiny_models import CHATML, VOCABULARY, tiny_tokenizer

__all__ = [
    "CHATML",
    "QUESTIONS",
    "VOCABULARY",
    "quantize_model",
    "save_tiny",
    "tiny_config",
    "tiny_model",
    "tiny_tokenizer",
    "write_rows",
]
ALIASES = {"llama": "llama3"}


def tiny_config(family: str, **changes: Any) -> Any:
    """A config of a family in ``tiny_models.FAMILIES``, or of ``llama``."""
    return tiny_models.tiny_config(ALIASES.get(family, family), **changes)


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """An fp32 model with random weights, in eval mode."""
    return tiny_models.tiny_model(ALIASES.get(family, family), seed, **changes)


def save_tiny(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A model folder in the Hugging Face format, tokenizer included."""
    return tiny_models.save_tiny(folder, ALIASES.get(family, family), seed=seed, **changes)


def quantize_model(model: Any, plan: Any, device: Any) -> None:
    """Quantize a model that is in memory."""
    from eulerforge.models.quantize import import_bitsandbytes, quantize_loaded

    import_bitsandbytes()
    quantize_loaded(model, plan, device)


QUESTIONS = [
    ("What is a beam?", "A beam carries load across a span."),
    ("Who builds?", "The builder."),
    ("Why?", "Because the law says so, and the plan too."),
    ("What is a permit?", "A permit lets you build a house on your land."),
]


def write_rows(path: Path, count: int = 24) -> Path:
    """A JSONL file of prompt/response rows."""
    rows = [QUESTIONS[index % len(QUESTIONS)] for index in range(count)]
    text = "".join(
        json.dumps({"prompt": f"{question} ({index})", "response": answer}) + "\n"
        for index, (question, answer) in enumerate(rows)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
