"""The prompts that both models answer: what a person reads, what the model gets, what the row itself says."""

from __future__ import annotations

import json
from pathlib import Path

import tiny

from eulerforge.config.schema import DataConfig
from eulerforge.data.prepared import build_dataset
from eulerforge.training.prompts import Sample, sample_prompts

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Who builds?"},
    {"role": "assistant", "content": "The builder."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
]


def test_a_person_reads_the_question_and_the_model_gets_the_whole_prompt(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"messages": TURNS}, {"prompt": "Why?", "response": "Law."}])))
    tokenizer = tiny.tiny_tokenizer()
    config = DataConfig(path=(str(path),), max_length=512, system_prompt="Be kind.")
    rows = build_dataset(config, tokenizer, cache_dir=tmp_path).train
    own, talk, plain = sample_prompts(tokenizer, config, texts=["What is it?"], rows=rows, count=5)
    assert (own.text, own.reference) == ("What is it?", None)
    assert (talk.text, talk.reference) == ("Who builds?", "The builder.")
    assert (plain.text, plain.reference) == ("Why?", "Law.")
    assert tokenizer.decode(plain.ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "Why?" not in tokenizer.decode(talk.ids)
    assert "Be kind." in tokenizer.decode(own.ids)


def test_a_row_without_turns_shows_its_prompt_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "Houses stand."}))
    tokenizer = tiny.tiny_tokenizer()
    config = DataConfig(path=(str(path),), max_length=512)
    rows = build_dataset(config, tokenizer, cache_dir=tmp_path).train
    (sample,) = sample_prompts(tokenizer, config, texts=[], rows=rows, count=1)
    assert sample.text == tokenizer.decode(sample.ids) == "H"
    assert sample.reference == "ouses stand."


def test_no_rows_and_no_count_give_the_own_prompts_alone() -> None:
    tokenizer, config = tiny.tiny_tokenizer(), DataConfig()
    assert [prompt.text for prompt in sample_prompts(tokenizer, config, texts=["a"], rows=None, count=3)] == ["a"]


def test_a_sample_is_readable_and_harmless() -> None:
    sample = Sample(prompt=" Why?\n", base="line one\n\nline two", tuned="\x1b[31mred", reference=None)
    assert sample.lines() == ["prompt: Why?", "  base: line one", "", "    line two", "  tuned: \\x1b[31mred"]
    assert Sample(prompt="p", base=None, tuned="", reference="r").lines() == ["prompt: p", "  tuned:", "  reference: r"]
