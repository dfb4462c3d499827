"""What the preview shows is what is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from eulerforge.data.prepared import build_dataset
from eulerforge.data.preview import RowPreview, preview_rows


@pytest.fixture
def first(write_rows: Callable[..., str], data_config: Any, chatml: Any) -> Callable[[dict[str, Any]], RowPreview]:
    def show(row: dict[str, Any]) -> RowPreview:
        data = build_dataset(data_config(path=(write_rows([row] * 3),)), chatml)
        previews = list(preview_rows(data.train, chatml, 2))
        assert len(previews) == 2
        return previews[0]

    return show


def test_trained_text_stands_in_marks(first: Callable[[dict[str, Any]], RowPreview]) -> None:
    shown = first({"prompt": "hello", "response": "world"})
    assert shown.marked("⟦", "⟧") == ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n⟦world<|im_end|>⟧\n")
    assert shown.source.endswith("rows.jsonl:1")
    assert shown.tokens == sum(run.tokens for run in shown.runs)
    assert shown.trained_tokens == sum(run.tokens for run in shown.runs if run.trained)
    assert json.loads(json.dumps(shown.to_json()))["runs"][1]["text"] == "world<|im_end|>"


def test_a_row_cannot_steer_the_terminal(first: Callable[[dict[str, Any]], RowPreview]) -> None:
    text = first({"prompt": "a", "response": "\x1b[2Jb\tc\n"}).marked("", "")
    assert "\x1b" not in text
    assert "\\x1b[2Jb\tc\n" in text
