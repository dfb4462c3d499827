"""Joined rows equal rendered ones, and what a template could treat specially is rendered."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eulerforge.data.read import BadRows
from eulerforge.data.render import Renderer
from eulerforge.data.rows import ChatRow
from eulerforge.data.turns import Message

TRICKY = ["<think>a</think>b", " space ", "", "[INST]", "{{ x }}", "line\n", "/no_think", "ab|cd", "\x1b[0m"]
SHAPES = [("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant", "user", "assistant")]


def row(*messages: tuple[str, str]) -> ChatRow:
    return ChatRow(
        messages=tuple(Message(role, content) for role, content in messages),
        separator="\n\n",
        kind="messages",
        place=1,
        where="rows.jsonl:1",
    )


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "reasoning"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.text(min_size=1) | st.sampled_from(TRICKY), min_size=4, max_size=4), st.sampled_from(SHAPES))
def test_any_row_is_joined_as_it_is_rendered(
    request: pytest.FixtureRequest, data_config: Any, name: str, texts: list[str], roles: tuple[str, ...]
) -> None:
    tokenizer = request.getfixturevalue(name)
    rows = [
        row(*zip(roles, [text.replace("\ud800", "x") for text in texts], strict=False)),
        row(*zip(roles, "abcd", strict=False)),
    ]
    one_by_one = Renderer(data_config(), tokenizer)
    assert Renderer(data_config(), tokenizer).render_all(rows, BadRows()) == [
        one_by_one.render(one, BadRows()) for one in rows
    ]


def test_ordinary_rows_are_not_rendered_one_by_one(
    chatml: Any, data_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = Renderer(data_config(), chatml)
    calls = []
    slow = renderer._template.render
    monkeypatch.setattr(renderer._template, "render", lambda messages: calls.append(1) or slow(messages))
    rows = [row(("user", f"question {index}"), ("assistant", "answer")) for index in range(500)]
    assert None not in renderer.render_all(rows, BadRows())
    assert len(calls) < 10


def test_a_template_that_steers_by_content_is_found_out(with_template: Any, data_config: Any) -> None:
    tokenizer = with_template(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] if 'zebra' not in m['content'] else 'STRIPED' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = Renderer(data_config(), tokenizer)
    rows = [row(("user", "q"), ("assistant", text)) for text in ("horse", "zebra", "a zebra", "cow")]
    texts = [one.text for one in renderer.render_all(rows, BadRows()) if one is not None]
    assert ["STRIPED" in text for text in texts] == [False, True, True, False]
    assert ["STRIPED" in one.text for one in renderer.render_all(rows[1:2], BadRows()) if one] == [True]
