"""The chat template shapes that people train on: sound ones pass the gate with the right span, faults are named."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from typing import Any

import attrs
import pytest
from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from eulerforge.data.parity import check_parity
from eulerforge.data.prepared import build_dataset
from eulerforge.data.prompt import render_prompt
from eulerforge.data.render import dated
from eulerforge.errors import DataError

TALK = [
    {"role": "user", "content": "question one"},
    {"role": "assistant", "content": "answer one"},
    {"role": "user", "content": "question two"},
    {"role": "assistant", "content": "answer two"},
]
PAIR = TALK[:2]
SYSTEM = [{"role": "system", "content": "be short"}, *TALK]


@attrs.frozen
class Family:
    """A template with its tokens; ``closes`` is what a trained answer ends in."""

    template: str
    closes: str
    special: tuple[str, ...]
    bos: str = ""
    system: bool = True
    strips: tuple[str, ...] = ()


def turns(before: str, after: str, *, ask: str, role: str = "m['role']", content: str = "m['content']") -> str:
    """Every message between two texts; ``ask`` stands where an answer is asked for."""
    body = "{% for m in messages %}" + before.replace("ROLE", "{{ " + role + " }}") + "{{ " + content + " }}" + after
    return body + "{% endfor %}{% if add_generation_prompt %}" + ask + "{% endif %}"


CHATML = turns("<|im_start|>ROLE\n", "<|im_end|>\n", ask="<|im_start|>assistant\n")
IM = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA3_ASK = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA3_TURNS = turns(
    "<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>", ask=LLAMA3_ASK, content="m['content'] | trim"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}"
)
THINK = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", IM),
    "chatml with a system turn of its own": Family(
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML,
        "<|im_end|>",
        IM,
    ),
    "llama 3": Family("{{ bos_token }}" + LLAMA3_TURNS, "<|eot_id|>", LLAMA3, LLAMA3[0]),
    "llama 3.1, which writes the date": Family(
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday is {{ date_string or '26 Jul 2024' }}"
        "<|eot_id|>" + LLAMA3_TURNS,
        "<|eot_id|>",
        LLAMA3,
        LLAMA3[0],
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}"
        + turns(
            "<start_of_turn>ROLE\n",
            "<end_of_turn>\n",
            ask="<start_of_turn>model\n",
            role="'model' if m['role'] == 'assistant' else m['role']",
            content="m['content'] | trim",
        ),
        "<end_of_turn>",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        system=False,
    ),
    "mistral": Family(INST, "</s>", ("<s>", "</s>"), "<s>", system=False),
    "mistral with marks of its own": Family(INST, "</s>", ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", system=False),
    "qwen 3": Family(THINK, "<|im_end|>", IM),
    "phi 3": Family(
        turns("<|ROLE|>\n", "<|end|>\n", ask="<|assistant|>\n"),
        "<|end|>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        strips=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "zephyr": Family(turns("<|ROLE|>\n", "</s>\n", ask="<|assistant|>\n"), "</s>", ("</s>",)),
    "one that strips": Family(
        turns("<|im_start|>ROLE\n", "<|im_end|>\n", ask="<|im_start|>assistant\n", content="m['content'].strip()"),
        "<|im_end|>",
        IM,
    ),
    "one with generation marks": Family(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>"
        "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
        IM,
    ),
    "alpaca's words": Family(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}### Response:\n{{ m['content'] }}</s>\n\n"
        "{% else %}### Instruction:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}",
        "</s>",
        ("</s>",),
    ),
}


@pytest.fixture(scope="module")
def made(byte_level_json: str) -> Callable[..., PreTrainedTokenizerFast]:
    """The tokenizer of a family, with another template where one is given."""

    def make(family: Family, template: str = "") -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer.from_str(byte_level_json)
        tokenizer.add_special_tokens(
            [AddedToken(text, rstrip=text in family.strips, special=True) for text in family.special]
        )
        if family.bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{family.bos} $A", special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))]
            )
        names = {"bos_token": family.bos} if family.bos else {}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=family.closes,
            chat_template=template or family.template,
            **names,
        )

    return make


def spans(data: Any, tokenizer: Any, row: int) -> list[str]:
    """The texts that are trained in a row."""
    ids, labelled = data.train.row(row)
    found, before = [], 0
    for token, trained in zip(ids.tolist(), labelled.tolist(), strict=True):
        if trained:
            found = [*found, []] if not before else found
            found[-1].append(token)
        before = trained
    return [tokenizer.decode(part, skip_special_tokens=False) for part in found]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sound_template_passes_and_trains_the_answers_alone(
    made: Any, write_rows: Any, data_config: Any, name: str
) -> None:
    family = FAMILIES[name]
    tokenizer = made(family)
    rows = [{"messages": turns} for turns in ([PAIR, TALK, SYSTEM] if family.system else [PAIR, TALK])] * 3
    config = data_config(path=(write_rows(rows),))
    data = build_dataset(config, tokenizer)
    parity = check_parity(data, config, tokenizer)
    assert parity.stopped == parity.whole == len(rows)
    assert parity.prompts == 3
    assert parity.warnings == ()
    for row, given in enumerate(rows):
        answers = [turn["content"] for turn in given["messages"] if turn["role"] == "assistant"]
        trained = spans(data, tokenizer, row)
        # what stands between the header and the answer of a reasoning template is the model's to write
        assert [text.rpartition("</think>\n\n")[2].strip() for text in trained] == [
            f"{answer}{family.closes}" for answer in answers
        ], trained
        if family.bos:
            assert data.train.row(row)[0].tolist().count(tokenizer.bos_token_id) == 1


def without_question(template: str) -> str:
    """The template, with what asks for an answer left out."""
    return template.partition("{% if add_generation_prompt %}")[0]


FAULTS: dict[str, tuple[Callable[[Family], str | None], str]] = {
    "no generation marker": (
        lambda family: without_question(family.template) if "add_generation_prompt" in family.template else None,
        "missing generation marker",
    ),
    "the BOS twice": (
        lambda family: "{{ bos_token }}" + family.template if family.bos else None,
        "double BOS",
    ),
    "an answer that changes": (
        lambda family: family.template.replace(
            "{% for m in messages %}", "{{ messages | length }}{% for m in messages %}"
        ),
        "differently from the prompt that asks for it",
    ),
    "a prompt in other words": (
        lambda family: (
            without_question(family.template) + "{% if add_generation_prompt %}Now answer:{% endif %}"
            if "add_generation_prompt" in family.template
            else None
        ),
        "differently from the prompt that asks for it",
    ),
    "no answer at all": (
        lambda family: family.template.replace("m['content']", "(m['content'] if m['role'] == 'user' else '')"),
        "lost answer",
    ),
    "no question at all": (
        lambda family: family.template.replace("m['content']", "(m['content'] if m['role'] == 'assistant' else '')"),
        "lost question",
    ),
}


# a family without a BOS cannot have two, and one whose answers have no header needs no marker
PLANTED = [(name, fault) for fault, (spoil, _) in FAULTS.items() for name, one in FAMILIES.items() if spoil(one)]


@pytest.mark.parametrize(("name", "fault"), PLANTED)
def test_a_planted_fault_is_named(made: Any, write_rows: Any, data_config: Any, name: str, fault: str) -> None:
    spoil, said = FAULTS[fault]
    family = FAMILIES[name]
    template = spoil(family) or ""
    assert template not in ("", family.template)
    tokenizer = made(family, template)
    config = data_config(path=(write_rows([{"messages": PAIR}] * 3),))
    with pytest.raises(DataError) as caught:
        check_parity(build_dataset(config, tokenizer), config, tokenizer)
    assert said in str(caught.value)
    assert caught.value.problems[0].hint


DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n"
"""As SmolLM3's, Mistral's and Llama 3.2's write it."""


def rendered_text(tokenizer: Any, config: Any) -> str:
    return str(tokenizer.decode(render_prompt(tokenizer, config, "Hello")))


def test_rows_with_yesterday_s_date_are_not_taken_from_the_cache(
    made: Any, write_rows: Any, data_config: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = made(FAMILIES["chatml"], DATED + CHATML)
    config = data_config(path=(write_rows([{"messages": PAIR}] * 3),), cache=True)
    made_at = [build_dataset(config, tokenizer, cache_dir=tmp_path).report for _ in range(2)]
    assert [report.cache for report in made_at] == ["built", "hit"]
    assert any("the chat template writes the date" in note for note in made_at[0].notes)
    began = dated(config, tokenizer, None)
    assert began.date == str(date.today())
    assert f"Today is {date.today():%d %b %Y}." in rendered_text(tokenizer, began)
    monkeypatch.setattr("eulerforge.data.render.today", lambda: date.today() + timedelta(days=1))
    assert f"Today is {date.today():%d %b %Y}." in rendered_text(tokenizer, began)
    assert f"Today is {date.today() + timedelta(days=1):%d %b %Y}." in rendered_text(tokenizer, config)
    assert build_dataset(began, tokenizer, cache_dir=tmp_path).report.cache == "hit"
    assert dated(config, tokenizer, "2020-02-29").date == "2020-02-29"
    assert build_dataset(config, tokenizer, cache_dir=tmp_path).report.cache == "built"
    plain = made(FAMILIES["chatml"])
    assert build_dataset(config, plain, cache_dir=tmp_path).report.notes == ()
