"""Rendering and the loss mask, held against the tokenizer's own apply_chat_template and against plain string work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from eulerforge.config.schema import DataConfig
from eulerforge.data.findings import UNTRAINED
from eulerforge.data.prepared import build_dataset
from eulerforge.data.prompt import render_prompt
from eulerforge.data.read import BadRows, SourceRow
from eulerforge.data.render import Rendered, Renderer
from eulerforge.data.rows import ChatRow, RowParser, TextRow
from eulerforge.data.tokenize import RowTokenizer, Tokens
from eulerforge.errors import DataError

TALK = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "Write one, two, three."},
    {"role": "assistant", "content": "one two\nthree  four"},
]
TEMPLATED = ["chatml", "llama3", "gemma"]
Train = Callable[..., tuple[list[int], list[int]]]


def tokenized(tokenizer: PreTrainedTokenizerFast, rendered: list[Rendered], bad: BadRows) -> list[Tokens | None]:
    """Rendered rows as (ids, labelled)."""
    rows = RowTokenizer(tokenizer)
    return rows.rows(rendered, rows.encode(rendered).encodings, bad)


@pytest.fixture
def train(data_config: Callable[..., Any]) -> Train:
    """(ids, labelled) of one row, or a DataError."""

    def run(tokenizer: PreTrainedTokenizerFast, data: dict[str, Any], **keys: Any) -> tuple[list[int], list[int]]:
        bad = BadRows()
        config = data_config(**keys)
        row = RowParser(config.schema).parse(SourceRow(data, 3, "rows.jsonl:3"), bad)
        bad.raise_if_any()
        assert isinstance(row, ChatRow | TextRow)
        rendered = Renderer(config, tokenizer).render(row, bad)
        results = tokenized(tokenizer, [rendered] if rendered else [], bad)
        bad.raise_if_any()
        assert results[0] is not None
        return results[0][0].tolist(), results[0][1].tolist()

    return run


def trained(tokenizer: PreTrainedTokenizerFast, row: tuple[list[int], list[int]]) -> list[str]:
    """The text of each run of trained tokens."""
    runs: list[list[int]] = []
    before = 0
    for token, labelled in zip(*row, strict=True):
        if labelled:
            if not before:
                runs.append([])
            runs[-1].append(token)
        before = labelled
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("name", TEMPLATED)
def test_ids_are_what_the_template_gives(name: str, train: Train, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    ids, _ = train(tokenizer, {"messages": TALK})
    assert ids == tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    if tokenizer.bos_token_id is not None:
        assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("name", "close"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>")]
)
def test_every_answer_and_its_closing_token_is_trained(
    name: str, close: str, train: Train, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    row = train(tokenizer, {"messages": TALK})
    assert trained(tokenizer, row) == [f"Paris.{close}", f"one two\nthree  four{close}"]


def test_the_mask_equals_generation_markers(train: Train, with_template: Any) -> None:
    """transformers' own assistant mask, from a template with generation markers, as the reference."""
    marked = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = with_template(marked)
    reference = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, labelled = train(tokenizer, {"messages": TALK})
    assert ids == reference["input_ids"]
    assert labelled == reference["assistant_masks"]


@pytest.mark.parametrize("name", [*TEMPLATED, "reasoning", "plain", "plain_bos", "no_eos", "spaced"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is the capital of France?", "response": " Paris."},
        {"prompt": "Answer: ", "response": "four"},
        {"prompt": "question\n", "response": "\n\nanswer"},
        {"prompt": "2 + 2 =", "response": " 4"},
        {"instruction": "Write a short answer", "input": "the question", "output": "Ça va, 日本語"},
        {"prompt": "Say it.", "completion": " It."},
        {"prompt": TALK[:1], "completion": TALK[1:2]},
        {"messages": TALK[:2]},
        {"conversations": TALK[:2]},
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "world"}]},
    ],
)
def test_generation_starts_from_a_token_prefix(
    name: str, row: dict[str, Any], train: Train, data_config: Any, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    ids, labelled = train(tokenizer, row)
    prompt = render_prompt(tokenizer, data_config(), row)
    first = labelled.index(1)
    assert ids[:first] == prompt
    assert not any(labelled[:first])
    without_answer = {key: value for key, value in row.items() if key not in ("response", "completion", "output")}
    for turns in ("messages", "conversations"):
        if turns in row:
            without_answer[turns] = row[turns][:-1]
    assert render_prompt(tokenizer, data_config(), without_answer) == prompt


def test_a_later_answer_starts_from_a_prefix_too(train: Train, chatml: Any, data_config: Any) -> None:
    ids, labelled = train(chatml, {"messages": TALK})
    prompt = render_prompt(chatml, data_config(), {"messages": TALK})
    assert ids[: len(prompt)] == prompt
    assert labelled[len(prompt) - 1 : len(prompt) + 1] == [0, 1]


@pytest.mark.parametrize("name", ["plain", "plain_bos", "no_eos", "spaced", "chatml"])
def test_an_earlier_answer_that_merges_with_its_prompt_is_cut_as_in_training(
    name: str, train: Train, data_config: Any, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    said = ("question\n", "\n\nanswer", "another\n", "\n\nlast")
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    ids, labelled = train(tokenizer, {"messages": turns})
    prompt = render_prompt(tokenizer, data_config(), {"messages": turns})
    assert ids[: len(prompt)] == prompt
    assert labelled[len(prompt) - 1 : len(prompt) + 1] == [0, 1]
    assert render_prompt(tokenizer, data_config(), {"messages": turns[:-1]}) == prompt


def test_text_as_prompt(chatml: Any, plain_bos: Any, data_config: Any) -> None:
    asked = chatml.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_dict=False
    )
    assert render_prompt(chatml, data_config(schema={"prompt": "question"}), "hello") == asked
    assert render_prompt(plain_bos, data_config(), "hello") == plain_bos("hello").input_ids
    assert render_prompt(plain_bos, data_config(), {"text": "hello"}) == plain_bos("hello").input_ids


class TestPlainText:
    def test_prompt_and_response_are_joined_as_they_are(self, train: Train, plain: Any) -> None:
        row = train(plain, {"prompt": "question: one\n", "response": "two"})
        assert plain.decode(row[0]) == "question: one\ntwo<|end|>"
        assert trained(plain, row) == ["two<|end|>"]

    def test_other_kinds_are_joined_by_a_blank_line(self, train: Train, plain: Any) -> None:
        row = train(plain, {"messages": TALK})
        assert plain.decode(row[0]) == (
            "What is the capital of France?\n\nParis.<|end|>\n\nWrite one, two, three.\n\none two\nthree  four<|end|>"
        )
        assert trained(plain, row) == ["Paris.<|end|>", "one two\nthree  four<|end|>"]

    def test_all_of_a_text_row_but_its_first_token(self, train: Train, plain: Any, plain_bos: Any) -> None:
        ids, labelled = train(plain, {"text": "hello world"})
        assert plain.decode(ids) == "hello world<|end|>"
        assert labelled == [0] + [1] * (len(ids) - 1)
        ids, labelled = train(plain_bos, {"text": "hello world"})
        assert ids == [*plain_bos("hello world").input_ids, plain_bos.eos_token_id]
        assert labelled == [0] + [1] * (len(ids) - 1)

    def test_text_rows_use_no_template(self, train: Train, llama3: Any) -> None:
        ids, _ = train(llama3, {"text": "hello"})
        assert llama3.decode(ids) == "<|begin|>hello<|eot_id|>"

    def test_no_eos_token(self, train: Train, no_eos: Any) -> None:
        row = train(no_eos, {"prompt": "hello", "response": " world"})
        assert trained(no_eos, row) == [" world"]

    def test_bos_and_eos_that_the_row_brings_are_not_doubled(self, train: Train, plain_bos: Any) -> None:
        ids, _ = train(plain_bos, {"prompt": "<|begin|>hello", "response": " world<|end|>"})
        assert plain_bos.decode(ids) == "<|begin|>hello world<|end|>"

    def test_template_none_ignores_the_template(self, train: Train, llama3: Any) -> None:
        ids, _ = train(llama3, {"prompt": "hello", "response": " world"}, template="none")
        assert llama3.decode(ids) == "<|begin|>hello world<|eot_id|>"

    def test_a_bos_token_that_is_never_used_is_not_put(self, train: Train) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<s>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
        assert train(tokenizer, {"text": "a b"}) == ([2, 3, 1], [0, 1, 1])


class TestTemplates:
    def test_a_template_without_bos_gets_the_one_that_the_tokenizer_uses(
        self, train: Train, with_template: Any, chatml: Any
    ) -> None:
        tokenizer = with_template(chatml.chat_template)
        ids, _ = train(tokenizer, {"messages": TALK})
        assert ids[0] == tokenizer.bos_token_id
        assert ids[1:] == tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)

    def test_system_prompt(self, train: Train, chatml: Any, plain: Any, data_config: Any) -> None:
        row = {"prompt": "hello", "response": "world"}
        own = {"messages": [{"role": "system", "content": "own"}, *TALK[:2]]}
        assert chatml.decode(train(chatml, row, system_prompt="be brief")[0]).startswith(
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello"
        )
        assert "be brief" not in chatml.decode(train(chatml, own, system_prompt="be brief")[0])
        assert plain.decode(train(plain, row, system_prompt="be brief")[0]) == "be brief\n\nhelloworld<|end|>"
        prompt = render_prompt(chatml, data_config(system_prompt="be brief"), "hello")
        assert chatml.decode(prompt).startswith("<|im_start|>system\nbe brief")

    def test_a_template_without_system_role_names_the_row(self, train: Train, gemma: Any, data_config: Any) -> None:
        with pytest.raises(DataError, match="System role not supported") as caught:
            train(gemma, {"prompt": "a", "response": "b"}, system_prompt="be brief")
        problem = caught.value.problems[0]
        assert (problem.source, problem.key) == ("rows.jsonl:3", "data.template")
        assert "data.system_prompt" in str(problem.hint)
        with pytest.raises(DataError, match="System role not supported"):
            render_prompt(gemma, data_config(system_prompt="be brief"), "a")

    def test_reasoning_that_only_the_last_answer_shows(self, train: Train, reasoning: Any) -> None:
        row = train(reasoning, {"messages": TALK})
        assert reasoning.decode(row[0]) == reasoning.apply_chat_template(TALK, tokenize=False)
        assert trained(reasoning, row) == [
            "Paris.<|im_end|>",
            "<think>\n\n</think>\n\none two\nthree  four<|im_end|>",
        ]

    def test_an_earlier_answer_that_is_shown_otherwise_than_asked_for_is_not_trained(
        self, with_template: Any, data_config: Any, write_rows: Any
    ) -> None:
        """As Qwen3.5's: the prompt opens the reasoning, of which nothing is left once more turns follow."""
        opens = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
            "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
            "{{ m['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
        )
        tokenizer = with_template(opens)
        path = write_rows([{"messages": TALK}, {"messages": TALK[:2]}] * 3 + [{"messages": [*TALK[:2], TALK[2]]}])
        built = build_dataset(data_config(path=(path,)), tokenizer)
        # a row that ends with a question is trained up to its last answer
        assert np.array_equal(built.train.row(6)[0], built.train.row(1)[0])
        for index, answer in ((0, TALK[-1]["content"]), (1, TALK[1]["content"]), (4, TALK[-1]["content"])):
            ids, labelled = built.train.row(index)
            learnt = tokenizer.decode(ids[labelled == 1].tolist())
            assert learnt == f"\n</think>\n\n{answer}<|im_end|>"
            prompt = render_prompt(tokenizer, data_config(), {"messages": TALK if index % 2 == 0 else TALK[:2]})
            assert ids[: len(prompt)].tolist() == prompt
        found = built.report.parts[0].findings[UNTRAINED]
        assert (found.count, found.first[0]) == (3, f"{path}:1")
        assert any("earlier answers that are not trained" in line for line in built.report.lines())

    @pytest.mark.parametrize("name", [*TEMPLATED, "reasoning"])
    def test_an_answer_with_no_turn_before_it_is_not_trained(
        self, name: str, train: Train, data_config: Any, write_rows: Any, request: pytest.FixtureRequest
    ) -> None:
        """ShareGPT conversations often begin with a greeting of the model: text that nothing asks for."""
        tokenizer = request.getfixturevalue(name)
        turns = [{"role": "assistant", "content": "Hello, I am here."}, *TALK]
        ids, labelled = row = train(tokenizer, {"messages": turns})
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(turns, tokenize=False)
        assert trained(tokenizer, row) == trained(tokenizer, train(tokenizer, {"messages": TALK}))
        prompt = render_prompt(tokenizer, data_config(), {"messages": turns})
        assert ids[: len(prompt)] == prompt
        assert labelled[len(prompt) - 1 : len(prompt) + 1] == [0, 1]
        built = build_dataset(data_config(path=(write_rows([{"messages": turns}] * 3),)), tokenizer)
        assert built.train.row(1)[0].tolist() == ids
        assert built.train.row(1)[1].tolist() == labelled
        assert built.report.parts[0].findings[UNTRAINED].count == 3

    @pytest.mark.parametrize("behind", [[], TALK[:1]])
    def test_a_row_whose_only_answer_has_no_turn_before_it_is_an_error(
        self, behind: list[dict[str, str]], train: Train, chatml: Any
    ) -> None:
        with pytest.raises(DataError, match="no turn before the row's answer asks for it") as caught:
            train(chatml, {"messages": [TALK[1], *behind]})
        assert caught.value.problems[0].hint == "delete that turn, or put a user turn before it"

    def test_a_template_whose_turns_must_begin_with_the_user_says_what_to_mend(
        self, train: Train, with_template: Any
    ) -> None:
        """As Gemma's, Llama 2's and Mistral's."""
        tokenizer = with_template(
            "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('Conversation roles must alternate') }}"
            "{% endif %}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
        )
        with pytest.raises(DataError, match="refuses this row: Conversation roles must alternate") as caught:
            train(tokenizer, {"messages": [TALK[1], *TALK]})
        assert "the row begins with an answer: delete that turn" in str(caught.value.problems[0].hint)

    def test_a_template_that_asks_for_no_answer_without_a_question(self, train: Train, with_template: Any) -> None:
        """As Qwen3.5's, which raises where there is no user turn."""
        tokenizer = with_template(
            "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
            "{{ raise_exception('No user query found in messages.') }}{% endif %}"
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        row = train(tokenizer, {"messages": [TALK[1], *TALK[:2]]}, system_prompt="be brief")
        assert trained(tokenizer, row) == ["Paris.<|im_end|>"]
        with pytest.raises(DataError, match="No user query found"):
            train(tokenizer, {"messages": [TALK[1]]}, system_prompt="be brief")

    def test_a_template_whose_prompt_is_no_prefix_is_an_error(self, train: Train, with_template: Any) -> None:
        broken = (
            "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}[assistant] <think>\n{% endif %}"
        )
        with pytest.raises(DataError, match="differently from the prompt") as caught:
            train(with_template(broken), {"prompt": "hello", "response": "world"})
        problem = caught.value.problems[0]
        assert problem.source == "rows.jsonl:3"
        assert "<think>" in problem.message
        assert "data.template=none" in str(problem.hint)

    def test_a_template_without_closing_token_gets_the_eos(self, train: Train, with_template: Any) -> None:
        open_ended = (
            "{% for m in messages %}### {{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}### assistant\n{% endif %}"
        )
        tokenizer = with_template(open_ended)
        row = train(tokenizer, {"messages": TALK})
        assert trained(tokenizer, row) == ["Paris.\n", "one two\nthree  four\n<|im_end|>"]

    def test_turns_after_the_last_answer_are_masked(self, train: Train, chatml: Any) -> None:
        row = train(chatml, {"messages": TALK[:3]})
        assert trained(chatml, row) == ["Paris.<|im_end|>"]

    def test_template_chat_needs_one(self, plain: Any, data_config: Any) -> None:
        with pytest.raises(DataError, match="no chat template") as caught:
            Renderer(data_config(template="chat"), plain)
        assert caught.value.problems[0].key == "data.template"


class TestBorders:
    def test_a_line_break_at_the_border_does_not_merge(self, train: Train, chatml: Any) -> None:
        """The whole text would be tokenized with one token for both line breaks: half prompt, half answer."""
        text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\nb<|im_end|>\n"
        merged = chatml(text, add_special_tokens=False).input_ids
        ids, _ = row = train(chatml, {"prompt": "a", "response": "\nb"})
        assert ids != merged
        assert chatml.decode(ids) == chatml.decode(merged) == text
        assert trained(chatml, row) == ["\nb<|im_end|>"]

    def test_a_tokenizer_that_begins_texts_with_a_space(self, train: Train, spaced: Any) -> None:
        ids, _ = row = train(spaced, {"prompt": "What is the capital of F", "response": "rance?"})
        assert spaced.decode(ids) == "What is the capital of France?<|end|>"
        assert trained(spaced, row) == ["rance?<|end|>"]

    def test_a_slow_tokenizer_is_refused(self) -> None:
        class Slow:
            pass

        with pytest.raises(DataError, match="no fast"):
            RowTokenizer(Slow())  # type: ignore[arg-type]


contents = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=80, deadline=None)
@given(pairs=st.lists(st.tuples(contents, contents), min_size=1, max_size=3), template=st.booleans())
def test_mask_and_text_hold_for_any_text(chatml: Any, pairs: list[tuple[str, str]], template: bool) -> None:
    """Character by character: the trained text is exactly the answers with their closing tokens."""
    config = DataConfig(template="auto" if template else "none")
    messages = [
        {"role": role, "content": content}
        for asked, answered in pairs
        for role, content in (("user", asked), ("assistant", answered))
    ]
    bad = BadRows()
    row = RowParser({}).parse(SourceRow({"messages": messages}, 1, "x:1"), bad)
    assert isinstance(row, ChatRow)
    rendered = Renderer(config, chatml).render(row, bad)
    assert rendered is not None
    (result,) = tokenized(chatml, [rendered], bad)
    assert not bad.total
    assert result is not None
    ids, labelled = result
    assert len(ids) == len(labelled)
    assert labelled[0] == 0
    backend = chatml.backend_tokenizer
    assert backend.decode(ids.tolist(), skip_special_tokens=False) == rendered.text
    answers = "".join(f"{answered}<|im_end|>" for _, answered in pairs)
    chosen = [token for token, trained_on in zip(ids.tolist(), labelled, strict=True) if trained_on]
    assert backend.decode(chosen, skip_special_tokens=False) == answers
