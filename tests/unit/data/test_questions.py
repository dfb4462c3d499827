"""What the user asked, for every row kind, read back from the row's own line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from eulerforge.config.schema import DataConfig
from eulerforge.data.prepared import build_dataset
from eulerforge.data.questions import _asked, question_of
from eulerforge.data.rows import ChatRow
from eulerforge.data.turns import Message

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "user", "content": "Who builds?"},
    {"role": "assistant", "content": "The builder."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Law."},
]
ROWS: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": "  What is a beam?\n", "response": "A bar."}, "What is a beam?"),
    ({"messages": TURNS}, "Who builds?"),
    ({"instruction": "Translate", "input": "hus", "output": "house"}, "Translate\n\nhus"),
    ({"text": "What is a beam? A bar."}, None),
    ({"messages": [TURNS[0], TURNS[3]]}, None),
    ({"prompt": "", "response": "Hello."}, None),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("template", ["auto", "none"])
def test_every_kind(tmp_path: Path, suffix: str, template: str) -> None:
    path = tmp_path / f"rows{suffix}"
    rows = [row for row, _ in ROWS]
    # an array may have all its rows on one line
    path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    config = DataConfig(path=(str(path),), template=template, max_length=512)
    built = build_dataset(config, tiny.tiny_tokenizer(), cache_dir=tmp_path).train
    found = [question_of(built, index, config, tiny.tiny_tokenizer()) for index in range(len(ROWS))]
    assert found == [question for _, question in ROWS]
    assert built.source(2) == (f"{path}:1[2]" if suffix == ".json" else f"{path}:3")


def test_answers_in_the_prompt_are_earlier_ones() -> None:
    """Of templates that show an earlier answer otherwise the last one alone is trained (``findings.UNTRAINED``)."""
    said = ("Who builds?", "The builder.", "Why?", "Law.")
    messages = tuple(Message(("user", "assistant")[at % 2], text) for at, text in enumerate(said))
    row = ChatRow(messages=messages, separator="", kind="messages", place=1, where="f:1")
    assert _asked(row, "user Who builds? assistant") == "Who builds?"
    assert _asked(row, "user Who builds? assistant The builder. user Why? assistant") == "Why?"
    assert _asked(row, "user What else? assistant") is None


def test_a_file_that_has_changed_since_gives_nothing_wrong(tmp_path: Path) -> None:
    path = tiny.write_rows(tmp_path / "rows.jsonl", 4)
    config = DataConfig(path=(str(path),), max_length=512)
    built = build_dataset(config, tiny.tiny_tokenizer(), cache_dir=tmp_path).train
    path.write_text('{"prompt": "Other?", "response": "Yes."}\n' + path.read_text())
    assert question_of(built, 0, config, tiny.tiny_tokenizer()) is None
    path.write_text("not JSON\n")
    assert question_of(built, 0, config, tiny.tiny_tokenizer()) is None
