"""Row kinds: what each becomes, and that every wrong one is named by file, line and key."""

from __future__ import annotations

from typing import Any

import pytest

from eulerforge.config.schema import DataConfig
from eulerforge.data.read import BadRows, SourceRow
from eulerforge.data.rows import ChatRow, ProcessedRow, Row, RowParser, TextRow
from eulerforge.data.turns import Message


def parse(data: dict[str, Any], schema: dict[str, str] | None = None, **keys: Any) -> tuple[Row | None, BadRows]:
    bad = BadRows()
    return RowParser(schema or {}, **keys).parse(SourceRow(data, 7, "rows.jsonl:7"), bad), bad


def turns(*pairs: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in pairs)


@pytest.mark.parametrize(
    ("data", "messages", "separator"),
    [
        ({"prompt": "p", "response": "r"}, [("user", "p"), ("assistant", "r")], ""),
        ({"prompt": "", "response": "r"}, [("user", ""), ("assistant", "r")], ""),
        ({"prompt": "p", "completion": "r"}, [("user", "p"), ("assistant", "r")], ""),
        ({"prompt": "p", "response": "r", "completion": "c"}, [("user", "p"), ("assistant", "r")], ""),
        (
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
             "completion": [{"role": "assistant", "content": "a"}]},
            [("system", "s"), ("user", "u"), ("assistant", "a")],
            0,
        ),
        ({"instruction": "do", "input": "this", "output": "done"}, [("user", "do\n\nthis"), ("assistant", "done")], 0),
        ({"instruction": "do", "input": "", "output": "done"}, [("user", "do"), ("assistant", "done")], 0),
        ({"instruction": "do", "input": None, "output": "done"}, [("user", "do"), ("assistant", "done")], 0),
        ({"instruction": "do", "output": "done"}, [("user", "do"), ("assistant", "done")], 0),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "x"},
                          {"role": "assistant", "content": "a"}]},
            [("system", "s"), ("user", "u"), ("assistant", "a")],
            0,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "u"},
                                                       {"type": "text", "text": "v", "image_url": None}]},
                          {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
            [("user", "uv"), ("assistant", "a")],
            0,
        ),
        (
            {"messages": [{"role": "developer", "content": "s"}, {"role": "User", "content": "u"},
                          {"role": "ASSISTANT", "content": "a"}]},
            [("system", "s"), ("user", "u"), ("assistant", "a")],
            0,
        ),
        ({"conversations": [{"from": "Human", "value": "u"}, {"from": "GPT", "value": "a"}]},
         [("user", "u"), ("assistant", "a")], 0),
        (
            {"conversations": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            [("user", "u"), ("assistant", "a")],
            0,
        ),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            [("user", "u"), ("assistant", "a")],
            0,
        ),
    ],
)  # fmt: skip
def test_chat_kinds(data: dict[str, Any], messages: list[tuple[str, str]], separator: str | int) -> None:
    row, bad = parse(data)
    assert not bad.problems
    assert isinstance(row, ChatRow)
    assert row.messages == turns(*messages)
    assert row.separator == ("\n\n" if separator == 0 else separator)


def test_text() -> None:
    row, _ = parse({"text": " as it is\n", "id": 3})
    assert isinstance(row, TextRow)
    assert row.text == " as it is\n"


def test_schema_maps_columns() -> None:
    row, _ = parse({"question": "q", "answer": "a", "prompt": 5}, {"prompt": "question", "response": "answer"})
    assert isinstance(row, ChatRow)
    assert row.messages == turns(("user", "q"), ("assistant", "a"))
    row, _ = parse(
        {"dialog": [{"who": "user", "says": "q"}, {"who": "assistant", "says": "a"}]},
        {"messages": "dialog", "role": "who", "content": "says"},
    )
    assert isinstance(row, ChatRow)
    assert row.messages == turns(("user", "q"), ("assistant", "a"))


@pytest.mark.parametrize(
    "data",
    [
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "tool_calls": None}]},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 1}]},
        {"messages": [{"role": "user", "content": "u", "weight": 0}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": None}]},
        {"prompt": "p", "response": "r", "system": "", "tools": "[]", "history": None},
        {"text": "t", "system": "of a text row nobody speaks"},
    ],
)
def test_what_is_empty_or_says_nothing_else_is_no_fault(data: dict[str, Any]) -> None:
    row, bad = parse(data)
    assert row is not None
    assert not bad.problems


@pytest.mark.parametrize(
    "data",
    [
        {"prompt": "u", "response": "a"},
        {"instruction": "u", "input": "", "output": "a"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
    ],
)
def test_a_system_column_is_the_first_turn(data: dict[str, Any]) -> None:
    row, bad = parse({**data, "system": "be brief"})
    assert not bad.problems
    assert isinstance(row, ChatRow)
    assert row.messages == turns(("system", "be brief"), ("user", "u"), ("assistant", "a"))


def test_an_input_that_is_the_instruction_is_not_said_twice() -> None:
    row, _ = parse({"input": "q", "output": "a"}, {"instruction": "input"})
    assert isinstance(row, ChatRow)
    assert row.messages == turns(("user", "q"), ("assistant", "a"))


def test_the_system_column_may_have_another_name() -> None:
    assert not list(DataConfig(schema={"system": "system_prompt"}).check())
    given = {"prompt": "u", "response": "a", "system_prompt": "be brief", "system": "not asked for"}
    row, bad = parse(given, {"system": "system_prompt"})
    assert not bad.problems
    assert isinstance(row, ChatRow)
    assert row.messages == turns(("system", "be brief"), ("user", "u"), ("assistant", "a"))
    parser = RowParser({"system": "history"})
    row = parser.parse(SourceRow({"prompt": "u", "response": "a", "history": "s"}, 1, "f:1"), bad)
    assert isinstance(row, ChatRow)
    assert row.messages[0] == Message("system", "s")
    assert parser.unread() == {}
    _, bad = parse({"prompt": "u", "response": "a", "system_prompt": 3}, {"system": "system_prompt"})
    assert (bad.problems[0].key, bad.problems[0].message) == ("system_prompt", "must be a string, not a number")


def test_a_column_that_is_mapped_is_read() -> None:
    row, _ = parse({"system": "q", "tools": "a"}, {"prompt": "system", "response": "tools"})
    assert isinstance(row, ChatRow)
    assert row.messages == turns(("user", "q"), ("assistant", "a"))


def test_columns_that_nobody_reads_are_counted() -> None:
    parser, bad = RowParser({"prompt": "question"}), BadRows()
    for data in (
        {"question": "q", "response": "a", "id": 1},
        {"question": "q", "response": "a", "id": 2, "source": "x"},
        {"instruction": "q", "input": "", "output": "a"},
        {"text": "t", "input": "not of this kind"},
    ):
        assert parser.parse(SourceRow(data, 1, "f:1"), bad) is not None
    turns_of = [{"role": "user", "content": "u", "name": "x"}, {"role": "assistant", "content": "a", "name": "y"}]
    assert parser.parse(SourceRow({"messages": turns_of}, 1, "f:1"), bad) is not None
    assert parser.parse(SourceRow({"messages": [USER | {"content": [PART | {"cache": 1}]}, ANSWER]}, 1, "f:1"), bad)
    assert parser.unread() == {
        "id": 2, "source": 1, "input": 1, "messages[].name": 1, "messages[].content[].cache": 1
    }  # fmt: skip
    assert parser.unread() == {}


def test_an_unknown_schema_key_is_refused() -> None:
    (problem,) = DataConfig(schema={"promt": "q"}).check()
    assert problem.key == "schema.promt"
    assert problem.hint == "did you mean prompt?"


USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
PART = {"type": "text", "text": "u"}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("data", "key", "message"),
    [
        ({"prompt": 1, "response": "r"}, "prompt", "must be a string, not a number"),
        ({"prompt": "p", "response": None}, "response", "must be a string, not null"),
        ({"prompt": "p", "response": ["r"]}, "response", "must be a string, not an array"),
        ({"prompt": "p", "response": " \n"}, "response", "is empty"),
        ({"prompt": "p", "completion": ""}, "completion", "is empty"),
        ({"prompt": [USER], "completion": "a"}, "prompt", "must be a string, not an array"),
        ({"prompt": "u", "completion": [ANSWER]}, "completion", "must be a string, not an array"),
        ({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, "prompt", "holds an answer, which is not to be"),
        ({"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}, "completion", "must be one turn, the answer, not 3"),
        ({"prompt": [USER], "completion": [USER]}, "completion", "no assistant turn"),
        ({"prompt": "p"}, "response", "is missing"),
        ({"response": "p"}, "prompt", "is missing"),
        ({"instruction": "p"}, "output", "is missing"),
        ({"instruction": "p", "input": 3, "output": "x"}, "input", "must be a string, not a number"),
        ({"instruction": "", "output": "x"}, "instruction", "is empty"),
        ({"text": {}}, "text", "must be a string, not an object"),
        ({"text": ""}, "text", "is empty"),
        ({"text": "a\ud800b"}, "text", "surrogate"),
        ({"messages": "hi"}, "messages", "must be an array of turns, not a string"),
        ({"messages": []}, "messages", "no assistant turn"),
        ({"messages": [USER]}, "messages", "no assistant turn"),
        ({"messages": [USER, "x"]}, "messages[1]", "must be an object, not a string"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content", "content is missing"),
        ({"messages": [USER, {"content": "x"}]}, "messages[1].role", "role is missing"),
        ({"messages": [USER, {"role": "asistant", "content": "x"}]}, "messages[1].role", "unknown role 'asistant'"),
        ({"messages": [USER, {"role": 1, "content": "x"}]}, "messages[1].role", "must be a string, not a number"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content", "not null"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "messages[1].content", "is empty"),
        ({"messages": [USER | {"content": [PART, IMAGE]}]}, "messages[0].content[1].type", "type 'image_url' is not"),
        ({"messages": [USER | {"content": [PART, "x"]}]}, "messages[0].content[1]", "must be an object, not a string"),
        ({"messages": [USER | {"content": [{"type": "text"}]}]}, "messages[0].content[0].text", "not null"),
        ({"messages": [USER | {"content": []}, ANSWER]}, "messages[0].content", "must be a string, not an array"),
        ({"messages": [USER, ANSWER | {"content": [PART | {"text": ""}]}]}, "messages[1].content", "is empty"),
        ({"conversations": [USER, {"from": "gpt", "value": "a"}]}, "conversations[1].role", "role is missing"),
        ({"conversations": [{"role": "user"}]}, "conversations[0].from", "from is missing"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "conversations[0].from", "unknown role 'robot'"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{}]}]}, "messages[1].tool_calls", "would be left out"),
        ({"messages": [USER, ANSWER | {"reasoning_content": "hm"}]}, "messages[1].reasoning_content", "left out"),
        ({"messages": [USER, ANSWER | {"function_call": {"name": "f"}}]}, "messages[1].function_call", "left out"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "messages[1].weight", "is not trained"),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "messages[1].weight", "by another weight"),
        ({"messages": [USER, ANSWER | {"train": False}]}, "messages[1].train", "is not trained"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, "tools", "would be left out"),
        ({"prompt": "p", "response": "r", "system": ["s"]}, "system", "must be a string, not an array"),
        ({"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"}, "system", "turn too"),
        ({"instruction": "p", "output": "r", "history": [["a", "b"]]}, "history", "would be left out"),
        ({"q": "a"}, None, "no known row kind; it has q"),
        ({}, None, "it has no keys"),
        ({"input_ids": [1], "labels": [1]}, "input_ids", "the row holds token ids"),
    ],
)
def test_wrong_rows_are_named(data: dict[str, Any], key: str | None, message: str) -> None:
    row, bad = parse(data)
    assert row is None
    (problem,) = bad.problems
    assert problem.source == "rows.jsonl:7"
    assert problem.key == key
    assert message in problem.message


@pytest.mark.parametrize(
    ("columns", "missing", "hint"),
    [
        (("instruction", "context", "response", "category"), "output", {"output": "response", "input": "context"}),
        (("instruction", "response"), "prompt", {"prompt": "instruction"}),
        (("instruction", "input", "response"), "output", {"output": "response"}),
        (("input", "output"), "instruction", {"prompt": "input", "response": "output"}),
        (("id", "question", "answer"), "prompt", {"prompt": "question", "response": "answer"}),
    ],
)
def test_the_hint_maps_the_columns_that_other_tools_files_have(
    columns: tuple[str, ...], missing: str, hint: dict[str, str]
) -> None:
    data = dict.fromkeys(columns, "x")
    _, bad = parse(data)
    (problem,) = bad.problems
    assert (problem.key, problem.message) == (missing, "is missing")
    assert {part.split("=")[0]: part.split("=")[1] for part in str(problem.hint).split("--set data.schema.")[1:]} == {
        key: name + " " * (key != list(hint)[-1]) for key, name in hint.items()
    }
    row, bad = parse(data, hint)
    assert isinstance(row, ChatRow)
    assert not bad.problems


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (("output",), "--set data.schema.instruction=COLUMN"),
        (("instruction", "context"), "--set data.schema.output=COLUMN (this row also has context)"),
        (("input", "output", "task"), "--set data.schema.instruction=COLUMN (this row also has task)"),
    ],
)
def test_a_column_that_cannot_be_guessed_is_asked_for(columns: tuple[str, ...], hint: str) -> None:
    _, bad = parse(dict.fromkeys(columns, "x"))
    assert bad.problems[0].hint == f"map the file's column: {hint}"


def test_the_known_roles_are_named() -> None:
    _, bad = parse({"messages": [USER, {"role": "tool", "content": "x"}]})
    assert bad.problems[0].hint == "known: system, developer, user, assistant"
    assert RowParser({}).with_blank_answer({"messages": [USER, {"role": "Assistant", "content": "a"}]})["messages"][1:]


def test_a_wrong_column_is_named_as_in_the_file() -> None:
    _, bad = parse({"question": 1, "answer": "a"}, {"prompt": "question", "response": "answer"})
    assert bad.problems[0].key == "question"
    _, bad = parse({"prompt": "p", "outcome": "a"})
    assert "--set data.schema.response=COLUMN" in str(bad.problems[0].hint)
    assert "outcome" in str(bad.problems[0].hint)


class TestProcessed:
    def parse(self, data: dict[str, Any]) -> tuple[Row | None, BadRows]:
        return parse(data, processed=True, vocabulary=10)

    def test_mask_comes_from_labels(self) -> None:
        row, _ = self.parse({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]})
        assert isinstance(row, ProcessedRow)
        assert (row.input_ids, row.labelled) == ((1, 2, 3), (False, True, True))

    def test_padding_at_the_end_is_cut(self) -> None:
        row, _ = self.parse({"input_ids": [1, 2, 0], "labels": [-100, 2, -100], "attention_mask": [1, 1, 0]})
        assert isinstance(row, ProcessedRow)
        assert row.input_ids == (1, 2)

    @pytest.mark.parametrize(
        ("data", "key", "message"),
        [
            ({"labels": [1]}, "input_ids", "is missing"),
            ({"input_ids": [1]}, "labels", "is missing"),
            ({"input_ids": [], "labels": []}, "input_ids", "is empty"),
            ({"input_ids": "1", "labels": [1]}, "input_ids", "must be an array of integers, not a string"),
            ({"input_ids": [1, 2], "labels": [1]}, "labels", "has 1 values, input_ids has 2"),
            ({"input_ids": [1, 10], "labels": [1, 10]}, "input_ids[1]", "10 is no token id: 0 to 9"),
            ({"input_ids": [-1], "labels": [-100]}, "input_ids[0]", "-1 is no token id"),
            ({"input_ids": [1, True], "labels": [1, 1]}, "input_ids[1]", "must be an integer, not true or false"),
            ({"input_ids": [1, 2.0], "labels": [1, 2]}, "input_ids[1]", "must be an integer, not a number"),
            ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "labels[0]", "2 is neither -100"),
            ({"input_ids": [1], "labels": [1], "attention_mask": [1, 1]}, "attention_mask", "2 values for 1 tokens"),
            ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [0, 1]}, "attention_mask", "ones, then zeros"),
        ],
    )
    def test_wrong_rows_are_named(self, data: dict[str, Any], key: str, message: str) -> None:
        row, bad = self.parse(data)
        assert row is None
        assert (bad.problems[0].source, bad.problems[0].key) == ("rows.jsonl:7", key)
        assert message in bad.problems[0].message
