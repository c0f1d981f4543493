"""Whatever is handed over as rows: conversations or one typed line, and strict JSON is JSON."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from student_trainer.data.rows import json_text
from student_trainer.data.rows.files import READERS
from student_trainer.data.rows.formats import Row, parse_rows
from student_trainer.data.rows.intake import Intake
from student_trainer.data.rows.messages import KNOWN_FIELDS
from student_trainer.data.rows.sources import known_fields
from student_trainer.errors import DataError

WORDS = st.sampled_from([
    "user", "assistant", "system", "gpt", "human", "tool", "function_call", "text", "type", "function", "name", "arguments", "conversations",
    "trace", "human", "{}", "[]", '{"name": "f"}', "", " ", "\ud800", "hello", *sorted(known_fields()), *sorted(KNOWN_FIELDS),
])  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | WORDS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4), max_leaves=12
)
ROWS = st.dictionaries(WORDS, VALUES, max_size=5)
TALK = st.lists(st.dictionaries(st.sampled_from(sorted(KNOWN_FIELDS)), VALUES, max_size=4), max_size=3)


def one_line(error: Exception) -> None:
    assert str(error) and "\n" not in str(error)


@given(ROWS | TALK.map(lambda talk: {"messages": [*talk, {"role": "assistant", "content": "a"}]}))
def test_any_row_is_a_conversation_or_one_typed_line(fields: dict) -> None:
    try:
        [conversation] = parse_rows([Row(fields, "d.jsonl", 1)])
    except DataError as error:
        one_line(error)
    else:
        assert conversation.turns[-1].role == "assistant" and any(turn.loss_weight > 0 for turn in conversation.turns)
        json.dumps([turn.message for turn in conversation.turns], ensure_ascii=False).encode()


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)), st.sampled_from([None, 1]))  # fmt: skip
def test_strict_json_reads_what_json_writes(value: object, indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    assert json_text.parse(text) == value
    if isinstance(value, list):
        items = json_text.parse_list(text)
        assert [item for item, _ in items] == value
        assert all(text.split("\n")[line - 1].strip() for _, line in items)


PIECES = st.text("{}[],:\"'\\ \n\tae1-.N#/", max_size=12) | st.sampled_from(
    ['{"a": 1}', '[{"a": 1}, ', "NaN", "true", '"x', "\ufeff", "a,b\n"]
)


@given(st.lists(PIECES, max_size=6).map("".join), st.sampled_from(["replace", "surrogatepass"]))
def test_any_file_is_rows_or_one_typed_line(text: str, errors: str) -> None:
    try:
        assert json_text.parse(text) == json.loads(text)
    except json_text.JsonError as error:
        one_line(error)
    for suffix in (".jsonl", ".json", ".csv", ".tsv"):
        for intake in (Intake(), Intake("skip")):
            try:
                rows = READERS[suffix](f"a{suffix}", text.encode(errors=errors), intake)
            except DataError as error:
                one_line(error)
            else:
                assert all(row.line > 0 for row in rows)


@given(st.binary(max_size=40))
def test_any_bytes_are_rows_or_one_typed_line(data: bytes) -> None:
    for suffix in (".jsonl", ".json", ".csv", ".parquet"):
        try:
            READERS[suffix](f"a{suffix}", data, Intake("skip"))
        except DataError as error:
            one_line(error)
