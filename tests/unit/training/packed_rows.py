"""Rows of random tokens of given lengths."""

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


def rows_under(prefixes: list[int], lengths: list[int], *, seed: int = 0) -> TokenizedRows:
    """Rows of so many tokens behind a prefix that all rows with one of its length have in common."""
    generator = np.random.default_rng(seed)
    common = {tokens: generator.integers(3, 120, tokens).astype(np.uint32) for tokens in sorted(set(prefixes))}
    own = random_rows(lengths, seed=seed + 1)
    rows = []
    for index, tokens in enumerate(prefixes):
        ids, labelled = own.row(index)
        ids = np.concatenate([common[tokens], ids])
        ids[tokens] = 3 + index  # otherwise some would go on alike
        rows.append((ids, np.concatenate([np.zeros(tokens, np.uint8), labelled])))
    return TokenizedRows.gather(rows, [(0, line) for line in range(len(rows))], ("rows.jsonl",))
