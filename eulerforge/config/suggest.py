"""The nearest name: what an error's hint offers for a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that ``word`` most likely means, or None.

    One slip (a letter dropped, doubled, changed, or two swapped) always counts, in the shortest names too.
    """
    ranked = sorted(
        (_distance(word.lower(), name.lower()), -difflib.SequenceMatcher(None, word, name).ratio(), name)
        for name in names
    )
    for distance, ratio, name in ranked:
        if distance <= 1 or -ratio >= 0.7 or distance <= len(name) // 3:
            return name
    return None


def _distance(a: str, b: str) -> int:
    """Optimal string alignment distance: edits and swaps of neighbours (Damerau 1964, restricted form)."""
    before: list[int] = []
    previous = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        current = [i]
        for j, right in enumerate(b, 1):
            best = min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (left != right))
            if i > 1 and j > 1 and left == b[j - 2] and a[i - 2] == right:
                best = min(best, before[j - 2] + 1)
            current.append(best)
        before, previous = previous, current
    return previous[-1]
