"""Rows of random tokens of given lengths, the first token of each untrained, like a prompt."""

from __future__ import annotations

import numpy as np

from eulerforge.data.tokenized import TokenizedRows


def random_rows(lengths: list[int], *, seed: int = 0) -> TokenizedRows:
    generator = np.random.default_rng(seed)
    return TokenizedRows.gather(
        [
            (
                generator.integers(3, 120, length).astype(np.uint32),
                (generator.random(length) < 0.8).astype(np.uint8),
            )
            for length in lengths
        ],
        [(0, line) for line in range(len(lengths))],
        ("rows.jsonl",),
    )
