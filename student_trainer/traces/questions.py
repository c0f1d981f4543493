"""Rows as questions to a teacher.

In: sources; out: `Question`s in order, each with the exact user content that evidence is quoted from. It reads every format
of training rows, and prompts alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from student_trainer.config.data import SourceConfig
from student_trainer.config.traces import ExampleConfig, QuestionConfig, TracesConfig
from student_trainer.data.inputs import source_of
from student_trainer.data.rows.formats import ANSWERS, Conversation, Row, Turn, parse_rows
from student_trainer.data.rows.sources import read_source
from student_trainer.data.text.encoding import Encoder
from student_trainer.data.text.templates import choose
from student_trainer.errors import DataError

QUESTION_FORMAT = "question"


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
    rows = read_source(source_of(source))
    if source.format == QUESTION_FORMAT or (source.format == "auto" and rows and _is_question(rows[0])):
        return [_question(row, config) for row in rows]
    conversations = parse_rows(rows, source.format, config.system_prompt)
    return [_of_conversation(row, made, config) for row, made in zip(rows, conversations, strict=True)]


def _is_question(row: Row) -> bool:
    """Whether a row is a prompt, with its answer perhaps, and not one of the training formats that have a prompt too."""
    return row.fields.get("prompt") is not None and not any(
        name in row.fields for name in ("messages", *ANSWERS) if name != "answer"
    )


def _of_conversation(row: Row, conversation: Conversation, config: QuestionConfig) -> Question:
    turns = conversation.turns
    for field, given in (("tools", conversation.tools), ("chat_template_kwargs", conversation.template_kwargs)):
        if given:
            raise row.error("a question has no place for it; leave it out with columns", field)
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
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, config: TracesConfig
) -> list[list[int]]:
    """The ids that each question is asked by, with the instruction in its system turn and the worked examples behind that.

    Raises:
        DataError: naming the row.
    """
    template = choose(config.data.template, tokenizer)
    prompts = []
    for question in questions:
        turns = _with_examples(_instructed(question.turns, config.instruction), config.examples)
        try:
            prompts.append(template.prompt(Conversation(turns)))
        except DataError as error:
            raise DataError(f"{question.key}: {error}") from error
    return Encoder(tokenizer, template).prompts(prompts)


def _instructed(turns: tuple[Turn, ...], instruction: str) -> tuple[Turn, ...]:
    if not instruction:
        return turns
    if turns[0].role == "system":
        return (Turn("system", f"{turns[0].content}\n\n{instruction}"), *turns[1:])
    return (Turn("system", instruction), *turns)


def _with_examples(turns: tuple[Turn, ...], examples: Sequence[ExampleConfig]) -> tuple[Turn, ...]:
    shown = [turn for one in examples for turn in (Turn("user", one.prompt), Turn("assistant", one.reply))]
    begin = 1 if turns[0].role == "system" else 0
    return (*turns[:begin], *shown, *turns[begin:])
