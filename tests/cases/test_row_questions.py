"""Kind: the same rows as questions to a teacher: every shape is asked, and what a question has no place for is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from student_trainer.config.traces import QuestionConfig
from student_trainer.errors import DataError
from student_trainer.traces.questions import Question, read_questions

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def asked(folder: Path, fields: dict, **source: object) -> Question:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(fields))
    config = QuestionConfig.model_validate({"sources": {"path": str(path), **source}})
    [question] = read_questions(config)
    return question


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q", "answer": "a"}, {"prompt": "q", "completion": "a"}, {"prompt": "q", "response": "a"}, {"question": "q", "answer": "a"},
        {"query": "q", "response": "a"}, {"messages": TALK}, {"messages": TALK, "prompt": "q", "prompt_id": 7},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)  # fmt: skip
def test_every_shape_is_a_question_with_its_answer(tmp_path: Path, fields: dict) -> None:
    question = asked(tmp_path, fields)
    assert (question.prompt, question.gold) == ("q", "a")


def test_other_names_are_mapped_here_too(tmp_path: Path) -> None:
    question = asked(tmp_path, {"frage": "q", "antwort": "a"}, columns={"frage": "prompt", "antwort": "answer"})
    assert (question.prompt, question.gold) == ("q", "a")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": TALK, "tools": [{"name": "f"}]}, "tools"),
        ({"messages": TALK, "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
        ({"messages": TALK, "images": ["x"]}, "images"),
        ({"prompt": "q", "answer": "a", "images": ["x"]}, "images"),
    ],
)
def test_what_a_question_cannot_have_is_refused(tmp_path: Path, fields: dict, field: str) -> None:
    with pytest.raises(DataError) as caught:
        asked(tmp_path, fields)
    assert caught.value.field == field
