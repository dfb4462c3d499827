"""The gate between training and inference: each planted fault is caught by its name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import attrs
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
        return check_parity(build_dataset(config, tokenizer), config, tokenizer)

    return run


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "plain", "plain_bos", "reasoning", "spaced"])
def test_sound_tokenizers_pass(gate: Gate, request: pytest.FixtureRequest, name: str) -> None:
    parity = gate(request.getfixturevalue(name))
    assert (parity.prompts, parity.rows, parity.whole, parity.stopped) == (3, 8, 8, 8)
    assert parity.warnings == ()
    assert "of 8 whole rows 8 train their stop token" in parity.line()


def test_a_template_whose_answers_have_no_header_needs_no_marker(gate: Gate, with_template: Any) -> None:
    assert gate(with_template(BRACKETS)).stopped == 8


# no EOS behind a question, so the BOS before the answer begins nothing of its own
TURN_BOS = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
)
ASSISTANT_BOS = "{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}"
# Llama 2's: each exchange is a sequence of its own
EXCHANGES = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}<|im_end|>"
    "{% else %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "where"), [(TWO_BOS, "twice in front"), (TURN_BOS + ASSISTANT_BOS, "before more turns than the first")]
)
def test_a_template_that_puts_more_than_one_bos(gate: Gate, with_template: Any, template: str, where: str) -> None:
    with pytest.raises(DataError, match=f"double BOS: the chat template puts <.begin.> {where}") as caught:
        gate(with_template(template))
    assert caught.value.problems[0].key == "data.template"
    assert gate(with_template(template), max_stray_specials=1.0).stopped == 8


def test_a_bos_that_begins_a_sequence_of_its_own_is_the_templates_right(gate: Gate, with_template: Any) -> None:
    turns = [{"role": role, "content": f"turn {turn}"} for turn in range(3) for role in ("user", "assistant")]
    assert gate(with_template(EXCHANGES), [{"messages": turns}]).stopped == 1


def test_more_than_one_bos_is_counted_where_the_tokenizer_begins_a_text_with_it(
    write_rows: Write, data_config: Any, with_template: Any
) -> None:
    turns = [{"role": role, "content": f"turn {turn}"} for turn in range(3) for role in ("user", "assistant")]
    config = data_config(path=(write_rows([{"messages": turns}, {"messages": turns[:2]}, {"messages": turns}]),))
    lines = build_dataset(config, with_template(EXCHANGES)).report.lines()
    assert any(line.startswith("  2 rows with more than one BOS token") and "lines 1, 3 of" in line for line in lines)


def test_a_bos_that_is_the_mark_of_every_turn_is_the_templates_right(gate: Gate, chatml: Any) -> None:
    """SmolLM2: BOS and EOS are ChatML's own marks, and a newline stands between one turn's end and the next's begin."""
    chatml = copy.deepcopy(chatml)
    chatml.bos_token, chatml.eos_token = "<|im_start|>", "<|im_end|>"
    chat = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    assert gate(chatml, [{"messages": chat}], max_stray_specials=0.0).stopped == 1


def test_rows_of_ids_with_a_double_or_inner_bos(gate: Gate, plain_bos: Any) -> None:
    bos, eos = plain_bos.bos_token_id, plain_bos.eos_token_id

    def row(*ids: int) -> dict[str, Any]:
        return {"input_ids": list(ids), "labels": [-100, *ids[1:]]}

    fine, joined = row(bos, 40, 41, eos), row(bos, 40, eos, bos, 41, eos)
    for wrong, name in (
        (row(bos, bos, 40, eos), "double BOS"),
        (row(bos, 40, bos, 41, eos), "a BOS inside of the row"),
    ):
        with pytest.raises(DataError, match=f"{name}: 1 of 3 rows") as caught:
            gate(plain_bos, [fine, joined, wrong], format="processed")
        assert (caught.value.problems[0].source or "").endswith("rows.jsonl:3")
        gate(plain_bos, [fine, wrong, *[joined] * 98], format="processed")  # one of a hundred is said, not refused
        with pytest.raises(DataError, match=name):
            gate(plain_bos, [fine, wrong, *[joined] * 98], format="processed", max_stray_specials=0.0)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "reasoning"])
def test_a_special_token_in_a_message_is_said_by_row_and_refused_in_many(
    request: pytest.FixtureRequest, write_rows: Write, data_config: Any, name: str
) -> None:
    tokenizer = request.getfixturevalue(name)
    token = tokenizer.bos_token or tokenizer.eos_token
    rows: list[dict[str, str]] = [*PAIRS] * 25
    rows[3] = {"prompt": f"say {token} again", "response": "no"}
    rows[7] = {"prompt": "say", "response": f"well {token}"}
    config = data_config(path=(write_rows(rows),))
    datasets = build_dataset(config, tokenizer)
    (finding,) = datasets.report.parts[0].findings.values()
    assert finding.first == (f"{config.path[0]}:4", f"{config.path[0]}:8")
    assert f"2 rows with a special token written out in a message: {finding.places()}" in str(datasets.report.lines())
    check_parity(datasets, config, tokenizer)
    with pytest.raises(DataError, match=r"special tokens out of place: a special token written out.*1 of 4 rows"):
        check_parity(build_dataset(few := attrs.evolve(config, max_rows=4), tokenizer), few, tokenizer)


def test_a_special_token_in_the_system_prompt(gate: Gate, chatml: Any) -> None:
    with pytest.raises(DataError, match="text of a special token is written out") as caught:
        gate(chatml, system_prompt="Be kind.<|im_end|>")
    assert caught.value.problems[0].key == "data.system_prompt"


def test_rows_that_are_rendered_already_may_hold_any_token(gate: Gate, plain_bos: Any, chatml: Any) -> None:
    text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
    assert gate(chatml, [{"text": text}]).stopped == 1
    assert gate(plain_bos, [{"text": f"<|begin|>{text}"}]).stopped == 1
    assert gate(chatml, [{"prompt": text, "response": "b"}], template="none").stopped == 1
    with pytest.raises(DataError, match="a BOS inside of the row: 1 of 1"):
        gate(plain_bos, [{"prompt": "a <|begin|>", "response": "b"}])


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


def test_answers_cut_by_max_length(gate: Gate, chatml: Any, write_rows: Write, data_config: Any) -> None:
    long = {"prompt": "a", "response": "word " * 300}
    rows = [long, *PAIRS]
    parity = gate(chatml, rows, max_length=64)  # one of nine
    assert (parity.rows, parity.whole) == (9, 8)
    config = data_config(path=(write_rows([long, *PAIRS[:3], long]),), max_length=64)
    datasets = build_dataset(config, chatml)
    part = datasets.report.parts[0]
    assert (part.truncated, part.lost_tokens) == (2, 2 * (part.longest - 64))
    with pytest.raises(DataError, match=r"cut answer: 2 of 5 rows \(40%\)") as caught:
        check_parity(datasets, config, chatml)
    (problem,) = caught.value.problems
    assert (problem.source, problem.key) == (f"{config.path[0]}:1", "data.max_length")
    assert f"lines 1, 5 of {config.path[0]}" in problem.message
    assert f"--set data.max_length={part.longest} keeps all" in (problem.hint or "")
    for cure in ({"max_length": part.longest}, {"on_long": "drop"}, {"max_cut_answers": 1.0}):
        gate(chatml, [long, *PAIRS[:3], long], **{"max_length": 64, **cure})


def test_a_cut_text_or_question_is_no_cut_answer(gate: Gate, chatml: Any, no_eos: Any) -> None:
    texts = [{"text": "word " * 300}]
    assert gate(chatml, texts, max_length=64).whole == 0
    turns = [("user", "a"), ("assistant", "b"), ("user", "word " * 300), ("assistant", "c")]
    asked = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    assert gate(chatml, asked, max_length=64).whole == 0
    gate(no_eos, [{"prompt": "a", "response": "word " * 300}], max_length=64)  # nothing could be cut off


def test_answers_cut_by_the_tool_that_made_the_ids(gate: Gate, plain: Any) -> None:
    eos = plain.eos_token_id
    cut, whole = ({"input_ids": [40, 41, 42, *end], "labels": [-100, 41, 42, *end]} for end in ([], [eos]))
    assert gate(plain, [cut, whole], format="processed").warnings[0].startswith("cut answers: 1 of 2")
    assert gate(plain, [cut, *[whole] * 4], format="processed", max_length=4).warnings  # shorter than a row may be
    with pytest.raises(DataError, match=r"cut answer: 1 of 1 rows \(100%\)") as caught:
        gate(plain, [cut], format="processed", max_length=3)
    assert "make longer ones" in (caught.value.problems[0].hint or "")
    with pytest.raises(DataError, match=r"cut answer: 1 of 1 rows") as caught:
        gate(plain, [whole], format="processed", max_length=3)
    assert "data.max_length=4 keeps all" in (caught.value.problems[0].hint or "")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add", "input": "1 2", "output": "3", "prompt": "Below is an instruction"},
        {"prompt": "", "response": "Once upon a time"},
    ],
    ids=["a prompt column beside instruction and output", "an empty prompt"],
)
def test_rows_that_are_sound_pass(gate: Gate, plain: Any, row: dict[str, str]) -> None:
    assert gate(plain, [row] * 4).prompts == 3
