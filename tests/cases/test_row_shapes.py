"""Kind: rows as people write them (cookbook#442, axolotl#2397, LLaMA-Factory#2507, Automodel#3143): used, or refused by name.

Each shape here is what its tool documents; what it must become is written out by hand.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_trainer.data.rows.formats import MEANING, Conversation, Row, Turn, detect, parse_rows
from student_trainer.errors import DataError

CALL = {"name": "weather", "arguments": {"city": "Bergen", "days": 2}}
NORMAL = [{"type": "function", "function": CALL}]
TOOL = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
NORMAL_TOOL = {"type": "function", "function": TOOL}
U, A = Turn("user", "q"), Turn("assistant", "a")
PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def parse(fields: dict, system: str = "") -> Conversation:
    [conversation] = parse_rows([Row(fields, "d.jsonl", 1)], "auto", system)
    return conversation


def refused(fields: dict) -> DataError:
    with pytest.raises(DataError) as caught:
        parse(fields)
    assert str(caught.value).startswith("d.jsonl:1: ") and "\n" not in str(caught.value)
    return caught.value


SHAPES = [
    ("instruction", {"instruction": "q", "output": "a"}, [U, A]),
    ("instruction", {"instruction": "", "input": "q", "output": "a"}, [U, A]),
    ("instruction", {"instruction": "q", "context": "c", "response": "a"}, [Turn("user", "q\nc"), A]),  # Dolly
    (
        "instruction",
        {"instruction": "q", "input": "", "output": "a", "system": "S", "history": [["u", "v"]]},
        [Turn("system", "S"), Turn("user", "u"), Turn("assistant", "v"), U, A],
    ),
    ("query_response", {"query": "q", "response": "a", "system": None, "history": []}, [U, A]),
    (
        "query_response",
        {"query": "q", "response": "a", "history": '[["u", "v"]]', "tools": "", "images": []},
        [Turn("user", "u"), Turn("assistant", "v"), U, A],
    ),
    ("question_answer", {"question": "q", "answer": "a"}, [U, A]),
    ("question_answer", {"system_prompt": "S", "question": "q", "response": "a"}, [Turn("system", "S"), U, A]),
    ("prompt_completion", {"prompt": "q", "completion": "a"}, [U, A]),
    ("prompt_completion", {"prompt": PAIR[:1], "completion": PAIR[1:]}, [U, A]),
    ("prompt_completion", {"prompt": PAIR[:1], "completion": "a"}, [U, A]),
    (
        "prompt_completion",
        {"prompt": [*PAIR, PAIR[0]], "completion": PAIR[1:]},
        [U, Turn("assistant", "a", loss_weight=0.0), U, A],
    ),
    ("messages", {"messages": PAIR}, [U, A]),
    ("messages", {"messages": json.dumps(PAIR)}, [U, A]),
    ("messages", {"messages": PAIR, "system": "S"}, [Turn("system", "S"), U, A]),
    ("messages", {"messages": PAIR, "prompt": "q", "prompt_id": "x"}, [U, A]),  # ultrachat
    ("messages", {"messages": [{"role": "developer", "content": "S"}, *PAIR]}, [Turn("system", "S"), U, A]),
    ("messages", {"messages": [{"role": "system", "content": ""}, *PAIR]}, [Turn("system", ""), U, A]),
    ("messages", {"messages": [PAIR[1], *PAIR]}, [A, U, A]),  # the assistant speaks first
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": ["a"]}]},
        [U, A],
    ),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [U, A]),
    ("sharegpt", {"conversations": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}]}, [U, A]),
    ("sharegpt", {"conversations": PAIR}, [U, A]),
    ("sharegpt", {"conversation": PAIR}, [U, A]),
    ("sharegpt", {"conversation": [{"human": "q", "assistant": "a"}], "system": "S"}, [Turn("system", "S"), U, A]),
    ("instruction", {"instruction": "q", "output": "a", "thinking": "r"}, [U, Turn("assistant", "a", extra={"reasoning_content": "r"})]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "turns"), SHAPES)
def test_every_shape_is_recognised_and_keeps_its_turns(name: str, fields: dict, turns: list[Turn]) -> None:
    row = Row(fields, "d.jsonl", 1)
    assert detect(row) == name
    assert parse(fields).turns == tuple(turns)
    with_nulls = {**dict.fromkeys(("messages", "conversations", "prompt", "images", "weight")), **fields}
    assert parse(with_nulls).turns == tuple(turns), "Arrow fills up the fields that other rows have"


def test_the_config_prompt_stands_where_the_row_has_none() -> None:
    for fields in ({"messages": PAIR}, {"conversation": PAIR}, {"query": "q", "response": "a", "system": ""}):
        assert parse(fields, "C").turns[0] == Turn("system", "C")
        assert parse({**fields, "system": "own"}, "C").turns[0] == Turn("system", "own")


CALLING = [
    [PAIR[0], {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}]}],
    [PAIR[0], {"role": "assistant", "tool_calls": [CALL]}],
    [PAIR[0], {"role": "assistant", "content": "", "function_call": {**CALL, "arguments": '{"city": "Bergen", "days": 2}'}}],
    [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(CALL)}],
    [PAIR[0], {"role": "tool_call", "content": json.dumps({"name": "weather", "parameters": CALL["arguments"]})}],
]  # fmt: skip


@pytest.mark.parametrize("messages", CALLING)
@pytest.mark.parametrize(
    "answer", [{"role": "tool"}, {"role": "function"}, {"from": "observation"}, {"role": "tool_response"}]
)
def test_tool_calls_and_answers_have_one_form(messages: list, answer: dict) -> None:
    said = {"value" if "from" in answer else "content": "rain"}
    conversation = parse({"messages": [*messages, {**answer, **said}, PAIR[1]], "tools": json.dumps([TOOL])})
    calls = Turn("assistant", "", extra={"tool_calls": NORMAL})
    assert conversation.turns == (U, calls, Turn("tool", "rain"), A)
    assert conversation.tools == (NORMAL_TOOL,)


def test_ids_and_names_of_tools_are_kept() -> None:
    messages = [
        PAIR[0],
        {"role": "assistant", "content": "let me see", "tool_calls": [{"id": "c1", **NORMAL[0]}]},
        {"role": "tool", "content": "", "name": "weather", "tool_call_id": "c1"},
        PAIR[1],
    ]
    conversation = parse({"messages": messages, "functions": [TOOL]})
    assert conversation.turns[1].message == {
        "role": "assistant", "content": "let me see", "tool_calls": [{"id": "c1", "type": "function", "function": CALL}],
    }  # fmt: skip
    assert conversation.turns[2] == Turn("tool", "", extra={"name": "weather", "tool_call_id": "c1"})
    assert conversation.tools == (NORMAL_TOOL,)


def test_calls_that_follow_one_another_are_one_turn() -> None:
    call = {"role": "tool_call", "content": json.dumps(CALL)}
    turns = parse(
        {"messages": [PAIR[0], PAIR[1], call, call, {"role": "tool_response", "content": "rain"}, PAIR[1]]}
    ).turns
    assert turns[1] == Turn("assistant", "a", extra={"tool_calls": [*NORMAL, *NORMAL]}) and len(turns) == 4


@pytest.mark.parametrize(
    ("flag", "weight"),
    [
        ({"weight": 0}, 0), ({"weight": 0.25}, 0.25), ({"weight": None}, 1), ({"train": False}, 0), ({"training": True}, 1), ({"loss": False}, 0),
        ({"loss": True}, 1), ({"loss_scale": 2.5}, 2.5), ({"mask": True}, 0), ({"masked": False}, 1), ({"train": False, "weight": 0}, 0),
    ],
)  # fmt: skip
def test_flags_of_a_message_decide_what_is_trained(flag: dict, weight: float) -> None:
    for key, said in (("role", "content"), ("from", "value")):
        first = {key: "assistant", said: "b", **flag}
        talk = [{key: "user", said: "q"}, first, {key: "user", said: "q"}, {key: "assistant", said: "a"}]
        assert parse({"conversations": talk}).turns == (U, Turn("assistant", "b", loss_weight=weight), U, A)


def test_a_row_weight_weighs_its_answers() -> None:
    assert [turn.loss_weight for turn in parse({"messages": PAIR, "weight": 0.5}).turns] == [1.0, 0.5]
    talk = [*PAIR, PAIR[0], {**PAIR[1], "weight": 0}]
    assert [turn.loss_weight for turn in parse({"messages": talk, "weight": "2"}).turns] == [1.0, 2.0, 1.0, 0.0]


def test_reasoning_has_one_name() -> None:
    for name in ("reasoning_content", "thinking", "reasoning"):
        [_, turn] = parse({"messages": [PAIR[0], {**PAIR[1], name: "r"}]}).turns
        assert turn.message == {"role": "assistant", "content": "a", "reasoning_content": "r"}


def test_template_kwargs_go_to_the_template() -> None:
    for value in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        assert parse({"messages": PAIR, "chat_template_kwargs": value}).template_kwargs == {"enable_thinking": False}
    assert "says" not in str(refused({"messages": PAIR, "chat_template_kwargs": {"tools": []}}))


REFUSED = [
    ({"messages": PAIR, "weight": 0}, "weight", "nothing to train"),
    ({"messages": [PAIR[0], {**PAIR[1], "train": False}]}, "messages", "nothing to train"),
    ({"messages": PAIR, "weight": -1}, "weight", "from 0 to 100"),
    ({"messages": PAIR, "weight": float("nan")}, "weight", "from 0 to 100"),
    ({"messages": PAIR, "loss": False}, "loss", "known of messages alone"),
    ({"messages": [{**PAIR[0], "train": True}, PAIR[1]]}, "messages[0].train", "only the assistant's"),
    ({"messages": [PAIR[0], {**PAIR[1], "train": True, "weight": 0}]}, "messages[1].train", "different things"),
    ({"messages": [PAIR[0], {**PAIR[1], "train_detail": [1]}]}, "messages[1].train_detail", "cannot be used"),
    ({"messages": PAIR, "images": ["a.png"]}, "images", "text alone"),
    ({"instruction": "q", "output": "a", "Audio": "a.wav"}, "Audio", "text alone"),
    ({"query": "q", "response": "a", "objects": {"bbox": [1]}}, "objects", "text alone"),
    ({"question": "q", "answer": "a", "photo": {"bytes": b"PNG", "path": "x"}}, "photo", "text alone"),
    ({"question": "q", "context": "c", "answer": "a"}, "context", "no place for it"),
    ({"messages": PAIR, "history": [["u", "v"]]}, "history", "no place for it"),
    ({"messages": PAIR, "enable_thinking": False}, "enable_thinking", "chat_template_kwargs"),
    ({"messages": PAIR, "rejected_response": "b"}, "rejected_response", "preference"),
    ({"prompt": "q", "completion": "a", "label": True}, "label", "preference"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "", "a preference row"),
    ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, "", "a preference row"),
    ({"text": "once upon a time"}, "", "a row of plain text"),
    ({"input_ids": [1], "labels": [1]}, "", "a tokenised row"),
    ({"instruction": "q", "output": "a", "response": "b"}, "response", "more than one answer"),
    ({"query": "q", "response": "a", "question": "q"}, "", "more than one format (query_response, question_answer)"),
    ({"messages": PAIR, "conversations": PAIR}, "", "more than one format (messages, sharegpt)"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, PAIR[1]]}, "messages[0].content[0].type", "image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "image": "x"}]}, PAIR[1]]}, "messages[0].content[0].image", "unknown"),
    ({"messages": [{**PAIR[0], "images": ["x"]}, PAIR[1]]}, "messages[0].images", "cannot be used"),
    ({"messages": [{"role": "user", "content": None}, PAIR[1]]}, "messages[0].content", "not null"),
    ({"messages": [PAIR[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{'a': 1}"}}]}]},
     "messages[1].tool_calls[0].function.arguments", "single quotes"),
    ({"messages": [PAIR[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
     "messages[1].tool_calls[0].function.arguments", "must be an object"),
    ({"messages": [PAIR[0], {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}]}, "messages[1].tool_calls[0].type", "type function"),
    ({"messages": [PAIR[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguements": {"a": 1}}]}]},
     "messages[1].tool_calls[0].arguements", "unknown field"),
    ({"messages": [{**PAIR[0], "tool_calls": [CALL]}, PAIR[1]]}, "messages[0].tool_calls", "belongs to the assistant"),
    ({"messages": PAIR, "tools": [{"description": "no name"}]}, "tools[0].function.name", "must be a string"),
    ({"messages": PAIR, "tools": "weather"}, "tools", "JSON text"),
    ({"messages": [{"role": "system", "content": "S"}, *PAIR], "system": "T"}, "system", "something else"),
    ({"messages": [PAIR[0], {"role": "developer", "content": "S"}, PAIR[1]]}, "messages[1].role", "the first one"),
    ({"conversations": [{"from": "human", "value": "q"}]}, "conversations", "the assistant's"),
    ({"conversations": [{"from": "human", "valeu": "q"}, {"from": "gpt", "value": "a"}]}, "conversations[0].value", "missing field"),
    ({"prompt": PAIR[:1], "completion": "a", "history": [["u", "v"]]}, "history", "stands beside"),
    ({"conversation": [{"human": "q", "assistant": "a", "loss": 0}]}, "conversation[0].loss", "unknown field"),
    ({"messages": PAIR, "chat_template_kwargs": {"add_generation_prompt": True}}, "chat_template_kwargs.add_generation_prompt", "itself"),
    ({"messages": PAIR, "chat_template_kwargs": {"x": "\ud800"}}, "chat_template_kwargs", "surrogate"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "field", "says"), REFUSED)
def test_what_changes_the_meaning_and_is_not_used_is_refused_by_name(fields: dict, field: str, says: str) -> None:
    error = refused(fields)
    assert says in str(error) and error.field == field


def test_a_preference_row_can_be_learned_from_by_naming_what_is_learned() -> None:
    assert "columns: {chosen: completion, rejected: null}" in str(
        refused({"prompt": "q", "chosen": "a", "rejected": "b"})
    )


@given(st.sampled_from(sorted(MEANING)), st.sampled_from([s[1] for s in SHAPES]))
def test_no_field_that_changes_the_meaning_is_dropped(field: str, fields: dict) -> None:
    """Whatever stands beside whichever shape: it changes the conversation, or is refused."""
    plain = parse(fields)
    try:
        other = parse({**fields, field: "0.5" if field == "weight" else '[["u", "v"]]'})
    except DataError:
        return
    assert other != plain or field in fields


TEXT = st.text(min_size=1).filter(lambda text: text.strip() and text.isprintable())
SPOKEN = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


@given(SPOKEN)
def test_all_shapes_of_one_conversation_are_one_conversation(spoken: list[tuple[str, str]]) -> None:
    messages = [
        {"role": role, "content": text}
        for pair in spoken
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    expected = parse({"messages": messages})
    renamed = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in messages]
    (query, response), history = spoken[-1], [list(pair) for pair in spoken[:-1]]
    assert expected == parse({"conversations": renamed})
    assert expected == parse({"query": query, "response": response, "history": history})
    assert expected == parse({"instruction": query, "input": "", "output": response, "history": json.dumps(history)})
    assert expected == parse({"conversation": [{"human": q, "assistant": a} for q, a in spoken]})
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    assert expected == parse({"messages": parts})
