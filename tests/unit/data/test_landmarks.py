"""Rows that are masked by their special tokens equal rows that are masked by their characters."""

from __future__ import annotations

import random
from typing import Any

import attrs
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eulerforge.config.schema import DataConfig
from eulerforge.data.cutting import NO_LABELS, TOO_LONG, Cutter
from eulerforge.data.landmarks import Landmarks, learn
from eulerforge.data.read import BadRows, SourceRow
from eulerforge.data.render import ANSWER_LAST, Rendered, Renderer
from eulerforge.data.rows import ChatRow, RowParser, TextRow
from eulerforge.data.tokenize import RowTokenizer, Tokens
from eulerforge.data.tokenized import RowChunk

WORDS = ["question", "answer", "two", "2+2", "café", "日本語", "🙂", "user", "assistant", "don't", "a|b", "<|im_end|>"]
SHAPES = [("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant", "user", "assistant")]


TOKENIZERS = ["chatml", "llama3", "gemma", "reasoning", "plain", "plain_bos", "stripping", "spaced_chatml"]


@pytest.fixture
def named(request: pytest.FixtureRequest) -> Any:
    """The tokenizer of a fixture's name."""
    return request.getfixturevalue


def rows_of(tokenizer: Any, count: int, words: list[str], *, system: bool) -> list[Rendered]:
    numbers, made = random.Random(5), []
    parser, bad, config = RowParser({}), BadRows(), DataConfig()
    for line in range(count):
        shape = numbers.choice(SHAPES if system else [SHAPES[0], SHAPES[2]])
        turns = [{"role": role, "content": " ".join(numbers.choices(words, k=numbers.randint(1, 6)))} for role in shape]
        data = {"text": turns[0]["content"]} if numbers.random() < 0.1 else {"messages": turns}
        made.append(parser.parse(SourceRow(data, line, f"f:{line}"), bad))
    rendered = Renderer(config, tokenizer).render_all([row for row in made if isinstance(row, ChatRow | TextRow)], bad)
    bad.raise_if_any()
    return [one for one in rendered if one is not None]


def one_by_one(tokenizer: Any, rendered: list[Rendered]) -> list[Tokens | None]:
    rows = RowTokenizer(tokenizer)
    return rows.rows(rendered, rows.encode(rendered).encodings, BadRows())


def in_chunks(rows: RowTokenizer, rendered: list[Rendered], size: int = 50) -> tuple[list[Tokens], int]:
    """All rows, and how many of them no character was asked for."""
    found: list[Tokens] = []
    fast = 0
    for start in range(0, len(rendered), size):
        chunk = rendered[start : start + size]
        encoded = rows.encode(chunk)
        fast += sum(encoded.fast)
        block = rows.block(chunk, encoded, BadRows())
        starts = block.starts()
        found += [
            (block.tokens[first : first + length], block.labelled[first : first + length])
            for first, length in zip(starts, block.lengths, strict=True)
        ]
    return found, fast


def whole_block(rows: RowTokenizer, rendered: list[Rendered], bad: BadRows) -> tuple[Any, ...]:
    """Ids, mask and lengths of all rows."""
    encoded = rows.encode(rendered)
    assert all(encoded.fast) == all(one.shape == ANSWER_LAST for one in rendered)
    block = rows.block(rendered, encoded, bad)
    return block.tokens, block.labelled, block.lengths


def assert_equal(found: list[Tokens], expected: list[Tokens | None]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert other is not None
        assert one[0].tolist() == other[0].tolist()
        assert one[1].tolist() == other[1].tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_chunks_equal_rows_one_by_one(named: Any, name: str) -> None:
    tokenizer = named(name)
    rendered = rows_of(tokenizer, 400, WORDS[:-2], system=name != "gemma")
    found, fast = in_chunks(RowTokenizer(tokenizer), rendered)
    assert_equal(found, one_by_one(tokenizer, rendered))
    # without a template, rows of several answers are not fast; a space before the first word moves with its border
    assert fast > (200 if name.startswith("plain") else 250), fast


@pytest.mark.parametrize("name", TOKENIZERS)
def test_plain_rows_with_one_answer_equal_rows_by_characters(named: Any, name: str) -> None:
    """Prompts that are empty, end in spaces or hold special tokens; answers that begin with spaces."""
    tokenizer, numbers = named(name), random.Random(3)
    ends = ["", "", " ", "\n", " \n", ": ", "é", "<|im_end|>"]
    pairs = [
        {
            "prompt": numbers.choice(["", " ".join(numbers.choices(WORDS, k=3))]) + numbers.choice(ends),
            "response": numbers.choice(ends) + " ".join(numbers.choices(WORDS, k=3)) + numbers.choice(ends),
        }
        for _ in range(300)
    ]
    parser, bad = RowParser({}), BadRows()
    rows = [parser.parse(SourceRow(pair, line, f"f:{line}"), bad) for line, pair in enumerate(pairs)]
    rendered = Renderer(DataConfig(template="none"), tokenizer).render_all(rows, bad)  # type: ignore[arg-type]
    fast = [one for one in rendered if one is not None]
    slow = [attrs.evolve(one, shape=0) for one in fast]
    refused, as_refused = BadRows(), BadRows()
    found = whole_block(RowTokenizer(tokenizer), fast, refused)
    expected = whole_block(RowTokenizer(tokenizer), slow, as_refused)
    assert refused.problems == as_refused.problems
    for one, other in zip(found, expected, strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_rows_with_markup_and_special_tokens_in_their_text_are_the_same_too(named: Any, name: str) -> None:
    tokenizer = named(name)
    rendered = rows_of(tokenizer, 400, WORDS, system=True)
    found, fast = in_chunks(RowTokenizer(tokenizer), rendered)
    assert_equal(found, one_by_one(tokenizer, rendered))
    assert 0 < fast < 300


@pytest.mark.parametrize("wrong", ["tail", "span", "special"])
def test_landmarks_that_do_not_hold_are_found_out(chatml: Any, wrong: str) -> None:
    rendered = rows_of(chatml, 100, WORDS[:-2], system=False)
    rows = RowTokenizer(chatml)
    in_chunks(rows, rendered)
    for shape, known in rows._shapes._known.items():
        assert known is not None
        first, *more = known.spans
        rows._shapes._known[shape] = {
            "tail": Landmarks(known.special, ((first[0], (*first[1], 1), first[2]), *more)),
            "span": Landmarks(known.special, ((0, (), first[2]), *more)),
            "special": Landmarks((*known.special[:-1], 0), known.spans),
        }[wrong]
    found, _ = in_chunks(rows, rendered)
    assert_equal(found, one_by_one(chatml, rendered))
    assert set(rows._shapes._known.values()) == {None}


def test_what_is_learnt_of_a_row() -> None:
    special = {1, 2}
    assert learn([1, 7, 2, 1, 8, 5, 5, 2, 9], [(5, 8)], special) == Landmarks((1, 2, 1, 2), ((2, (8,), 3),))
    assert learn([1, 7, 5, 5], [(2, 4)], special) == Landmarks((1,), ((0, (7,), None),))
    assert learn([5, 2], [(0, 2)], special) == Landmarks((2,), ((None, (), None),))
    assert learn([7, 5, 2], [(1, 3)], special) is None  # no special token before the span
    assert learn([1, 5, 6, 2], [(1, 2)], special) is None  # nor at its end
    assert learn([1, *[7] * 17, 5, 2], [(18, 20)], special) is None  # too far off


def naive(
    pairs: list[tuple[list[int], list[int]]], most: int, drop: bool
) -> tuple[list[Any], dict[str, int], tuple[int, int, int]]:
    kept, dropped, truncated, lost, longest = [], dict.fromkeys((TOO_LONG, NO_LABELS), 0), 0, 0, 0
    for ids, mask in pairs:
        if len(ids) > most and drop:
            dropped[TOO_LONG] += 1
            lost += len(ids)
        elif not any(mask[:most]):
            dropped[NO_LABELS] += 1
            lost += len(ids)
        else:
            kept.append((ids[:most], mask[:most]))
            truncated += len(ids) > most
            lost += max(0, len(ids) - most)
            longest = max(longest, len(ids))
    return kept, {why: count for why, count in dropped.items() if count}, (truncated, lost, longest)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("most", [1, 3, 5, 100])
def test_cutting_a_chunk_equals_cutting_its_rows(most: int, drop: bool) -> None:
    numbers = np.random.default_rng(most)
    lengths = numbers.integers(0, 8, 200)
    pairs = [(numbers.integers(0, 9, n).tolist(), (numbers.random(n) < 0.3).astype(int).tolist()) for n in lengths]
    rows = [(np.array(ids, np.uint32), np.array(mask, np.uint8)) for ids, mask in pairs]
    cutter = Cutter(max_length=most, drop_long=drop)
    chunk, used, cut = cutter.cut(RowChunk.of(rows, [(0, line) for line in range(200)]))
    kept, dropped, counts = naive(pairs, most, drop)
    found = [
        (chunk.tokens[start : start + length].tolist(), chunk.labelled[start : start + length].tolist())
        for start, length in zip(chunk.starts(), chunk.lengths, strict=True)
    ]
    assert found == kept
    assert cutter.to_facts()["dropped"] == dropped
    assert (cutter.truncated, cutter.lost, cutter.longest) == counts
    assert chunk.origins[:, 1].tolist() == used.tolist()
    assert [len(pairs[row][0]) > most for row in used] == cut.tolist()


@pytest.mark.parametrize("shape", [ANSWER_LAST, 0])
def test_an_unknown_word_over_the_border_is_no_place_to_cut(shape: int) -> None:
    """The row's ``<unk>`` for "ab" is no token of the prompt, which ends in "a", though it is a special one."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    bad = BadRows()
    row = Rendered("q ab<eos>", ((3, 9),), "f:1", shape=shape)
    rows = RowTokenizer(tokenizer)
    block = rows.block([row], rows.encode([row]), bad)
    assert block.lengths.tolist() == [0]
    assert "reaches over the border" in bad.problems[0].message
