"""The prompts that the base and the tuned model answer, and the two answers side by side.

Training's summary and ``bench`` both come from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from eulerforge.data.prompt import render_prompt
from eulerforge.data.questions import question_of
from eulerforge.data.tokenized import TokenizedRows
from eulerforge.terminal import harmless

if TYPE_CHECKING:
    from eulerforge.config.schema import DataConfig


@attrs.frozen(kw_only=True)
class SamplePrompt:
    """Token ids to generate from; ``text`` is what a person reads of them, ``reference`` the row's own answer."""

    ids: list[int]
    text: str
    reference: str | None


@attrs.frozen(kw_only=True)
class Sample:
    """One prompt with both answers; ``base`` is None where the base was not asked this."""

    prompt: str
    base: str | None
    tuned: str
    reference: str | None

    def lines(self) -> list[str]:
        """The sample as a person reads it."""
        shown = {"prompt": self.prompt, "  base": self.base, "  tuned": self.tuned, "  reference": self.reference}
        lines: list[str] = []
        for name, text in shown.items():
            if text is not None:
                # a model's answer must not be able to steer the terminal
                first, *more = harmless(text.strip()).split("\n")
                lines += [f"{name}: {first}".rstrip(), *(f"    {line}".rstrip() for line in more)]
        return lines


def sample_prompts(
    tokenizer: Any, config: DataConfig, *, texts: Sequence[str], rows: TokenizedRows | None, count: int
) -> list[SamplePrompt]:
    """The user's own prompts, then those of the first ``count`` held-out rows, each up to its first answer."""
    prompts = [SamplePrompt(ids=render_prompt(tokenizer, config, text), text=text, reference=None) for text in texts]
    if rows is None:
        return prompts
    for index in range(min(count, len(rows))):
        ids = rows.prompt(index).tolist()
        question = question_of(rows, index, config, tokenizer)
        text = question if question is not None else str(tokenizer.decode(ids, skip_special_tokens=True))
        prompts.append(SamplePrompt(ids=ids, text=text, reference=_first_answer(tokenizer, rows, index)))
    return prompts


def _first_answer(tokenizer: Any, rows: TokenizedRows, index: int) -> str:
    """The first run of trained tokens: what a model that learnt the row by heart would write after its prompt."""
    ids, labelled = rows.row(index)
    start = int(np.argmax(labelled))
    length = int(np.argmin(np.append(labelled[start:], 0)))
    return str(tokenizer.decode(ids[start : start + length].tolist(), skip_special_tokens=True)).strip()
