from __future__ import annotations

import pytest

from student_trainer.data.rows.formats import FORMATS, Row, Turn, detect, parse_rows
from student_trainer.errors import DataError


def rows(*fields: dict) -> list[Row]:
    return [Row(f, "d.jsonl", i) for i, f in enumerate(fields, start=1)]


def messages(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize("extra", [{}, {"input": ""}, {"input": None}])
def test_instruction_without_input_asks_the_instruction_alone(extra: dict) -> None:
    [conversation] = parse_rows(rows({"instruction": "Say hi.", "output": "hi", **extra}))
    assert conversation.turns == (Turn("user", "Say hi."), Turn("assistant", "hi"))


def test_instruction_with_input_and_system_prompt() -> None:
    [conversation] = parse_rows(rows({"instruction": "Add.", "input": "1 2\r\n", "output": " 3"}), "auto", "Be brief.")
    assert conversation.turns == (Turn("system", "Be brief."), Turn("user", "Add.\n1 2\r\n"), Turn("assistant", " 3"))


def test_messages_keep_every_turn_and_their_own_system() -> None:
    turns = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    [conversation] = parse_rows(rows(messages(*turns)), "auto", "other")
    assert [(t.role, t.content) for t in conversation.turns] == turns
    [conversation] = parse_rows(rows(messages(*turns[1:])), "auto", "other")
    assert conversation.turns[0] == Turn("system", "other")


GOOD = {"instruction": "i", "output": "o"}
BROKEN = [
    ({"instruction": "i"}, "output", "missing field"),
    ({"instruction": "i", "output": 3}, "output", "must be a string, not int"),
    ({"instruction": "i", "output": " \n"}, "output", "must not be empty"),
    ({"instruction": None, "output": "o"}, "instruction", "not null"),
    ({"instruction": "i", "input": ["x"], "output": "o"}, "input", "not list"),
    ({"instruction": "i", "output": "o", "history": [["a"]]}, "history[0]", "must be a pair"),
    ({"instruction": "i", "output": "\ud800"}, "output", "surrogate"),
]
BROKEN_MESSAGES = [
    ({"messages": "hello"}, "messages", "must be a list"),
    ({"messages": []}, "messages", "last message"),
    ({"messages": ["hello"]}, "messages[0]", "must be an object"),
    (messages(("user", "a")), "messages", "last message must be the assistant's"),
    (messages(("assistant", "a")), "messages", "no user message"),
    (messages(("narrator", "a"), ("assistant", "b")), "messages[0].role", "system, user, assistant"),
    (messages(("user", "a"), ("system", "s"), ("assistant", "b")), "messages[1].role", "first"),
    ({"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}, "messages[0].content", "missing"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [1]}]},
        "messages[1].tool_calls[0]",
        "must be a call",
    ),
]


@pytest.mark.parametrize(("fields", "field", "says"), BROKEN)
def test_broken_instruction_rows_name_file_line_and_field(fields: dict, field: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        parse_rows(rows(GOOD, GOOD, fields))
    assert (caught.value.file, caught.value.line, caught.value.field) == ("d.jsonl", 3, field)
    assert "d.jsonl:3: " in str(caught.value) and f"field={field}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("fields", "field", "says"), BROKEN_MESSAGES)
def test_broken_messages_name_file_line_and_field(fields: dict, field: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_rows(rows(fields))
    assert says in str(caught.value) and (caught.value.line, caught.value.field) == (1, field)


def test_a_file_that_mixes_formats_names_the_line() -> None:
    with pytest.raises(DataError, match=r"d\.jsonl:2: a row of format messages in a source of format instruction"):
        parse_rows(rows(GOOD, messages(("user", "a"), ("assistant", "b"))))


def test_detection_refuses_none_and_several() -> None:
    with pytest.raises(DataError, match="fits no format") as caught:
        detect(Row({"frage": "x"}, "d.jsonl", 1))
    assert all(name in str(caught.value) for name in FORMATS)
    with pytest.raises(DataError, match="more than one"):
        detect(Row({**GOOD, "messages": []}, "d.jsonl", 1))


def test_unknown_format_lists_the_known() -> None:
    with pytest.raises(DataError, match="known: auto, instruction, messages"):
        parse_rows(rows(GOOD), "alpaca")
