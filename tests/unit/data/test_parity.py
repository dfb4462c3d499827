"""The gate between training and inference: each planted fault is caught by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from eulerforge.data.parity import Parity, check_parity
from eulerforge.data.prepared import build_dataset
from eulerforge.errors import DataError

Write = Callable[..., str]
Gate = Callable[..., Parity]
PAIRS = [{"prompt": f"question {number}", "response": f"answer {number}"} for number in range(8)]
HEADERLESS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TWO_BOS = (
    "{{ bos_token }}{{ bos_token }}" + HEADERLESS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# like Llama 2's: an answer has no header, so nothing need be there to ask for one
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}<|im_end|>"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)


@pytest.fixture
def gate(write_rows: Write, data_config: Any) -> Gate:
    def run(tokenizer: Any, rows: Any = PAIRS, **keys: Any) -> Parity:
        config = data_config(path=(write_rows(rows),), **keys)
        return check_parity(build_dataset(config, tokenizer).train, config, tokenizer)

    return run


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "plain", "plain_bos", "reasoning", "spaced"])
def test_sound_tokenizers_pass(gate: Gate, request: pytest.FixtureRequest, name: str) -> None:
    parity = gate(request.getfixturevalue(name))
    assert (parity.prompts, parity.rows, parity.whole, parity.stopped) == (3, 8, 8, 8)
    assert parity.warnings == ()
    assert "of 8 whole rows 8 train their stop token" in parity.line()


def test_a_template_whose_answers_have_no_header_needs_no_marker(gate: Gate, with_template: Any) -> None:
    assert gate(with_template(BRACKETS)).stopped == 8


def test_a_planted_double_bos(gate: Gate, with_template: Any, plain_bos: Any) -> None:
    with pytest.raises(DataError, match="double BOS") as caught:
        gate(with_template(TWO_BOS))
    assert (caught.value.problems[0].source or "").endswith("rows.jsonl:1")
    bos = plain_bos.bos_token_id
    with pytest.raises(DataError, match="double BOS"):
        gate(plain_bos, [{"input_ids": [bos, bos, 40], "labels": [-100, -100, 40]}], format="processed")


def test_pad_is_eos_masked_by_id(gate: Gate, plain: Any) -> None:
    eos = plain.eos_token_id
    row = {"input_ids": [40, 41, 42, eos], "labels": [-100, 41, 42, -100]}
    with pytest.raises(DataError, match="pad = eos") as caught:
        gate(plain, [{"input_ids": [40, eos], "labels": [-100, eos]}, row], format="processed")
    assert (caught.value.problems[0].source or "").endswith("rows.jsonl:2")


def test_pad_is_eos_does_not_mask_what_we_render(gate: Gate, chatml: Any) -> None:
    assert chatml.pad_token_id == chatml.eos_token_id
    assert gate(chatml).stopped == 8


def test_a_missing_generation_marker(gate: Gate, with_template: Any) -> None:
    with pytest.raises(DataError, match="missing generation marker") as caught:
        gate(with_template(HEADERLESS))
    assert "<|im_start|>assistant" in str(caught.value)
    assert caught.value.problems[0].key == "data.template"


def test_cut_answers_are_said(gate: Gate, plain: Any, no_eos: Any) -> None:
    rows = [{"input_ids": [40, 41, 42], "labels": [-100, 41, 42]}]
    (warning,) = gate(plain, rows, format="processed").warnings
    assert warning.startswith("cut answers: 1 of 1 rows")
    assert gate(no_eos).warnings[0].startswith("cut answers: 8 of 8 rows")


def test_a_prompt_that_inference_renders_otherwise(gate: Gate, chatml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from eulerforge.data import parity

    real = parity.render_prompt
    monkeypatch.setattr(parity, "render_prompt", lambda *args: [real(*args)[1], *real(*args)[1:]])
    with pytest.raises(DataError, match="no token prefix of the row: they part at token 0"):
        gate(chatml)
    monkeypatch.setattr(parity, "render_prompt", lambda *args: real(*args)[:-1])
    with pytest.raises(DataError, match="the first token after the prompt that inference renders is not trained"):
        gate(chatml)


def test_truncated_rows_are_left_to_the_report(gate: Gate, chatml: Any) -> None:
    long = [{"prompt": "a", "response": "word " * 300}, *PAIRS]
    parity = gate(chatml, long, max_length=64)
    assert (parity.rows, parity.whole) == (9, 8)
