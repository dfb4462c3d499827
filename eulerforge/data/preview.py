"""A row as a person reads it: runs of text, each either trained or masked.

Notable: the runs come from the token ids and the mask that training uses, not from the rendered text, so what is shown
is what is learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import attrs

from eulerforge.data.tokenized import TokenizedRows
from eulerforge.terminal import harmless

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@attrs.frozen(kw_only=True)
class Run:
    """Neighbouring tokens of a row that are all trained or all masked."""

    text: str
    tokens: int
    trained: bool


@attrs.frozen(kw_only=True)
class RowPreview:
    """One row; ``source`` is ``file:line``."""

    source: str
    tokens: int
    trained_tokens: int
    runs: tuple[Run, ...]

    def marked(self, trained_start: str, trained_end: str, masked_start: str = "", masked_end: str = "") -> str:
        """The row's text with marks around its runs, such as ⟦ and ⟧."""
        parts = []
        for run in self.runs:
            text = harmless(run.text)
            parts.append(f"{trained_start}{text}{trained_end}" if run.trained else f"{masked_start}{text}{masked_end}")
        return "".join(parts)

    def to_json(self) -> dict[str, Any]:
        plain = attrs.asdict(self)
        return {**plain, "runs": [attrs.asdict(run) for run in self.runs]}


def preview_rows(rows: TokenizedRows, tokenizer: PreTrainedTokenizerBase, count: int) -> Iterator[RowPreview]:
    """The first ``count`` rows, decoded with their special tokens."""
    for index in range(min(count, len(rows))):
        ids, labelled = rows.row(index)
        runs = []
        for trained, group in groupby(zip(ids.tolist(), labelled.tolist(), strict=True), key=lambda pair: pair[1]):
            part = [token for token, _ in group]
            text = str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            runs.append(Run(text=text, tokens=len(part), trained=bool(trained)))
        yield RowPreview(
            source=rows.source(index),
            tokens=len(ids),
            trained_tokens=int(labelled.sum()),
            runs=tuple(runs),
        )
