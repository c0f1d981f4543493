"""Rows as questions to a teacher.

In: sources; out: `Question`s in order, each with the exact user content that evidence is quoted from. It reads every format
of training rows, and prompts alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from student_trainer.config import SourceConfig
from student_trainer.data.encoding import Encoder
from student_trainer.data.formats import Conversation, Row, Turn, parse_rows
from student_trainer.data.sources import parse_source, read_source
from student_trainer.data.templates import choose
from student_trainer.errors import ConfigError, DataError
from student_trainer.traces.config import QuestionConfig

QUESTION_FORMAT, _MARKER = "question", "prompt"


@dataclass(frozen=True)
class Question:
    """One thing to ask.

    Attributes:
        turns: everything before the answer, as the row has it; the last one is the user's.
        gold: the known answer, or None.
        key: "file:line" of the row.
    """

    turns: tuple[Turn, ...]
    gold: str | None
    key: str

    @property
    def prompt(self) -> str:
        """The exact user content."""
        return self.turns[-1].content


def read_questions(config: QuestionConfig) -> list[Question]:
    """All questions, in the order of the sources.

    Raises:
        DataError: naming file, line and field.
    """
    return [question for source in config.sources for question in _of_source(source, config)]


def digest(questions: Sequence[Question]) -> str:
    """Names what is asked, answers included."""
    return hashlib.sha256(repr(questions).encode()).hexdigest()


def _of_source(source: SourceConfig, config: QuestionConfig) -> list[Question]:
    data = parse_source(source.path)
    if source.sample is not None and data.sample is not None:
        raise ConfigError(f"data: {source.path} and sample={source.sample}: give the number of rows once")
    rows = read_source(replace(data, sample=data.sample or source.sample, split=source.split))
    if source.format == QUESTION_FORMAT or (source.format == "auto" and rows and _MARKER in rows[0].fields):
        return [_question(row, config) for row in rows]
    conversations = parse_rows(rows, source.format, config.system_prompt)
    return [_of_conversation(row, turns.turns, config) for row, turns in zip(rows, conversations, strict=True)]


def _of_conversation(row: Row, turns: tuple[Turn, ...], config: QuestionConfig) -> Question:
    if turns[-2].role != "user":
        raise row.error("the turn before the answer must be the user's", "messages", turns[-2].role)
    return Question(turns[:-1], turns[-1].content if config.use_answers else None, row.key)


def _question(row: Row, config: QuestionConfig) -> Question:
    texts: dict[str, str | None] = {}
    for field in ("prompt", "answer", "system"):
        value = row.fields.get(field)
        if (value is not None or field == "prompt") and (not isinstance(value, str) or not value.strip()):
            raise row.error("must be a text that is not empty", field, value)
        texts[field] = value
    for field in row.fields:
        if field not in texts:
            raise row.error("unknown field; a question has prompt, answer and system", field)
    system = texts["system"] or config.system_prompt
    turns = (*((Turn("system", system),) if system else ()), Turn("user", texts["prompt"] or ""))
    return Question(turns, texts["answer"] if config.use_answers else None, row.key)


def encode_questions(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, config: QuestionConfig
) -> list[list[int]]:
    """The ids that each question is asked by, with the instruction in its system turn.

    Raises:
        DataError: naming the row.
    """
    template = choose(config.template, tokenizer)
    prompts = []
    for question in questions:
        try:
            prompts.append(template.prompt(Conversation(_instructed(question.turns, config.instruction))))
        except DataError as error:
            raise DataError(f"{question.key}: {error}") from error
    return Encoder(tokenizer, template).prompts(prompts)


def _instructed(turns: tuple[Turn, ...], instruction: str) -> tuple[Turn, ...]:
    if not instruction:
        return turns
    if turns[0].role == "system":
        return (Turn("system", f"{turns[0].content}\n\n{instruction}"), *turns[1:])
    return (Turn("system", instruction), *turns)
