"""From files to tokenized rows: counts, cutting, dropping, splitting and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eulerforge.data.cutting import NO_LABELS, TOO_LONG
from eulerforge.data.prepared import build_dataset
from eulerforge.data.prompt import render_prompt
from eulerforge.errors import DataError

Write = Callable[..., str]
PAIRS = [{"prompt": f"question {number}\n", "response": f"answer {number}"} for number in range(20)]


def texts(rows: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(rows.row(index)[0].tolist()) for index in range(len(rows))]


def test_rows_come_in_file_order_with_their_source(write_rows: Write, plain: Any, data_config: Any) -> None:
    first, second = write_rows(PAIRS[:2], "a.jsonl"), write_rows([{"text": "hello"}], "b.jsonl")
    data = build_dataset(data_config(path=(first, second)), plain, seed=1)
    assert texts(data.train, plain) == [
        "question 0\nanswer 0<|end|>",
        "question 1\nanswer 1<|end|>",
        "hello<|end|>",
    ]
    assert [data.train.source(index) for index in range(3)] == [f"{first}:1", f"{first}:2", f"{second}:1"]
    assert data.validation is None
    report = data.report
    assert report.parts[0].kinds == {"prompt/response": 2, "text": 1}
    assert report.train_tokens == len(data.train.tokens) == data.train.offsets[-1]
    assert report.train_label_tokens == data.train.labelled.sum()
    assert (data.train.tokens.dtype, data.train.labelled.dtype) == (np.uint32, np.uint8)
    assert data.train.prompt(0).tolist() == render_prompt(plain, data_config(), "question 0\n")


def test_max_length_cuts_and_counts(write_rows: Write, plain: Any, data_config: Any) -> None:
    rows = [
        {"prompt": "a", "response": "b"},  # a, b, end
        {"prompt": "2", "response": "2222222222"},  # digits are single tokens: cut
        {"prompt": "2222222222", "response": "2"},  # nothing of the answer is left: dropped
    ]
    data = build_dataset(data_config(path=(write_rows(rows),), max_length=4), plain)
    assert texts(data.train, plain) == ["ab<|end|>", "2222"]
    assert (data.report.parts[0].truncated, data.report.parts[0].dropped) == (1, {NO_LABELS: 1})
    text = "\n".join(data.report.lines())
    assert "1 rows truncated to data.max_length = 4 tokens" in text
    assert f"1 rows dropped: {NO_LABELS}" in text
    assert json.loads(json.dumps(data.report.to_json()))["parts"][0]["rows_usable"] == 2


def test_on_long_drop(write_rows: Write, plain: Any, data_config: Any) -> None:
    path = write_rows([{"text": "ab"}, {"text": "2222222222"}])
    data = build_dataset(data_config(path=(path,), max_length=4, on_long="drop"), plain)
    assert len(data.train) == 1
    assert data.report.parts[0].dropped == {TOO_LONG: 1}


def test_no_row_left_is_an_error(write_rows: Write, plain: Any, data_config: Any) -> None:
    path = write_rows([{"prompt": "2222222222", "response": "2"}] * 3)
    with pytest.raises(DataError, match=rf"none of 3 rows is left to use: {NO_LABELS} \(3 rows\)") as caught:
        build_dataset(data_config(path=(path,), max_length=4), plain)
    assert caught.value.problems[0].key == "data.max_length"
    empty = write_rows([], "empty.jsonl")
    with pytest.raises(DataError, match="there are no rows") as caught:
        build_dataset(data_config(path=(empty,)), plain)
    assert caught.value.problems[0].key == "data.path"
    with pytest.raises(DataError, match="there are no rows") as caught:
        build_dataset(data_config(path=(path,), validation={"path": (empty,)}), plain)
    assert caught.value.problems[0].key == "data.validation.path"
    ids = write_rows([{"input_ids": [1, 2], "labels": [-100, -100]}], "ids.jsonl")
    with pytest.raises(DataError, match="none of 1 rows") as caught:
        build_dataset(data_config(path=(ids,), format="processed"), plain)
    assert str(caught.value.problems[0].hint).startswith("label what is to be trained")


def test_bad_rows_of_all_files_are_shown_at_once(tmp_path: Path, gemma: Any, data_config: Any) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(b'\n{"prompt": 1, "response": "r"}\nnonsense\n')
    second.write_bytes(
        b'{"text": "fine"}\n{"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]}\n'
    )
    with pytest.raises(DataError) as caught:
        build_dataset(data_config(path=(str(first), str(second))), gemma)
    assert [(problem.source, problem.key) for problem in caught.value.problems] == [
        (f"{first}:2", "prompt"),
        (f"{first}:3", None),
        (f"{second}:2", "data.template"),
    ]


def test_max_rows_reads_no_further(write_rows: Write, plain: Any, data_config: Any) -> None:
    path = write_rows([*PAIRS[:3], {"nonsense": 1}])
    data = build_dataset(data_config(path=(path,), max_rows=3), plain)
    assert (len(data.train), data.report.parts[0].rows_read) == (3, 3)


class TestValidation:
    def test_by_size_and_fraction(self, write_rows: Write, plain: Any, data_config: Any) -> None:
        path = write_rows(PAIRS)
        for validation in ({"size": 5}, {"fraction": 0.25}):
            data = build_dataset(data_config(path=(path,), validation=validation), plain)
            assert data.validation is not None
            held_out, kept = texts(data.validation, plain), texts(data.train, plain)
            assert (len(held_out), len(kept)) == (5, 15)
            assert sorted(held_out + kept) == sorted(f"question {n}\nanswer {n}<|end|>" for n in range(20))
            assert data.report.validation_rows == 5

    def test_the_runs_seed_does_not_move_the_split(self, write_rows: Write, plain: Any, data_config: Any) -> None:
        path = write_rows(PAIRS)

        def held_out(seed: int, split_seed: int) -> str:
            config = data_config(path=(path,), validation={"size": 5, "seed": split_seed})
            data = build_dataset(config, plain, seed=seed)
            assert data.validation is not None
            return data.validation.sha256

        assert held_out(1, 0) == held_out(2, 0)
        assert held_out(1, 0) != held_out(1, 1)

    def test_own_file(self, write_rows: Write, plain: Any, data_config: Any) -> None:
        path, own = write_rows(PAIRS), write_rows([{"text": "hello"}], "own.jsonl")
        data = build_dataset(data_config(path=(path,), validation={"path": (own,)}), plain)
        assert data.validation is not None
        assert (len(data.train), texts(data.validation, plain)) == (20, ["hello<|end|>"])
        assert data.report.notes == ()
        data = build_dataset(data_config(path=(path,), validation={"path": (path,), "allow_overlap": True}), plain)
        assert "also a training file" in data.report.notes[0]

    def test_own_file_that_is_absent(self, write_rows: Write, plain: Any, data_config: Any) -> None:
        with pytest.raises(DataError) as caught:
            build_dataset(data_config(path=(write_rows(PAIRS),), validation={"path": ("absent.jsonl",)}), plain)
        assert caught.value.problems[0].key == "data.validation.path"


class TestProcessed:
    def test_ids_and_mask_are_taken_as_they_are(self, write_rows: Write, plain: Any, data_config: Any) -> None:
        path = write_rows([{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}])
        data = build_dataset(data_config(path=(path,), format="processed"), plain)
        ids, labelled = data.train.row(0)
        assert (ids.tolist(), labelled.tolist()) == ([5, 6, 7], [0, 0, 1])

    def test_an_id_beyond_the_vocabulary(self, write_rows: Write, plain: Any, data_config: Any) -> None:
        size = len(plain)
        path = write_rows([{"input_ids": [5, size], "labels": [5, size]}])
        with pytest.raises(DataError, match=f"{size} is no token id") as caught:
            build_dataset(data_config(path=(path,), format="processed"), plain)
        assert caught.value.problems[0].source == f"{path}:1"

    def test_a_row_without_labels_is_dropped(self, write_rows: Write, plain: Any, data_config: Any) -> None:
        row = {"input_ids": [5, 6], "labels": [-100, 6]}
        path = write_rows([row, {"input_ids": [5, 6], "labels": [5, -100]}])
        data = build_dataset(data_config(path=(path,), format="processed"), plain)
        assert data.report.parts[0].dropped == {NO_LABELS: 1}


def test_more_rows_than_one_batch_of_the_tokenizer(write_rows: Write, chatml: Any, data_config: Any) -> None:
    rows = [{"prompt": f"question {number}", "response": str(number)} for number in range(2500)]
    data = build_dataset(data_config(path=(write_rows(rows),)), chatml)
    for index in (0, 1023, 1024, 2499):
        ids, labelled = data.train.row(index)
        assert chatml.decode(ids[labelled == 1].tolist()) == f"{index}<|im_end|>"
        assert data.train.origin(index) == (0, index + 1)


def test_unread_columns_and_turns_without_a_template_are_said(
    write_rows: Write, plain: Any, chatml: Any, data_config: Any
) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    path = write_rows([{"messages": turns, "source": "x"}, {"messages": turns}])
    report = build_dataset(data_config(path=(path,)), plain).report
    assert report.parts[0].unread == {"source": 1}
    assert "  columns that are not read: source (1 rows)" in report.lines()
    assert any("has no chat template" in note for note in report.notes)
    meant = build_dataset(data_config(path=(path,), template="none"), plain)
    assert not any("has no chat template" in note for note in meant.report.notes)
    assert not any(
        "has no chat template" in note for note in build_dataset(data_config(path=(path,)), chatml).report.notes
    )
