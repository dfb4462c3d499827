"""Rows of mixed length for the benchmarks: real questions and answers, joined until the lengths are spread out.

The same token ids, masks and order go to every rival, so that only the training itself differs.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

QUESTIONS = "pkg://zaragoza_construction_faq/data/faq-en-alpaca.jsonl"
IGNORED = -100


def mixed_rows(tokenizer: Any, count: int, seed: int) -> list[dict[str, list[int]]]:
    """``count`` rows {input_ids, labels}; answers of 1 to 12 questions in a row, about 215 tokens on average."""
    from eulerforge.config.location import resolve_location

    lines = resolve_location(QUESTIONS).read_text(encoding="utf-8").splitlines()
    faq = [json.loads(line) for line in lines]
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        wanted = min(12, 1 + int(draw.paretovariate(1.3)))
        picked = draw.sample(faq, wanted)
        asked = [{"role": "user", "content": " ".join(row["instruction"] for row in picked)}]
        answer = "\n\n".join(row["output"] for row in picked)
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": prompt_ids + answer_ids, "labels": [IGNORED] * len(prompt_ids) + answer_ids})
    return rows


def full_rows(tokenizer: Any, count: int, length: int, seed: int) -> list[dict[str, list[int]]]:
    """``count`` rows of exactly ``length`` tokens, every one of them trained."""
    pool = [token for row in mixed_rows(tokenizer, 400, seed) for token in row["input_ids"]]
    draw = random.Random(seed)
    starts = [draw.randrange(len(pool) - length) if len(pool) > length else 0 for _ in range(count)]
    rows = [(pool[start:] + pool * (length // len(pool) + 1))[:length] for start in starts]
    return [{"input_ids": row, "labels": list(row)} for row in rows]


def write_jsonl(path: Path, rows: list[dict[str, list[int]]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, list[int]]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def in_training_order(
    rows: list[dict[str, list[int]]], batch_size: int, steps: int, seed: int
) -> list[dict[str, list[int]]]:
    """The rows in the order in which our run with this seed takes them: what the rivals get, unshuffled."""
    import numpy as np

    order: list[int] = []
    epoch = 0
    while len(order) < batch_size * steps:
        order += np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(rows)).tolist()
        epoch += 1
    return [rows[index] for index in order[: batch_size * steps]]
