"""Rows to prompts, and a teacher's samples to rows, by the template and the tokenizer of a run.

In: the config of a run, samples; out: what to ask of each row, and of each sample a conversation or the reason why nobody could learn from it.

Axes: n tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from student_trainer.config.run import TrainConfig
from student_trainer.config.traces import GenerateConfig
from student_trainer.data.inputs import source_of
from student_trainer.data.rows.formats import Conversation, Row, Turn, read_rows
from student_trainer.data.rows.intake import Intake
from student_trainer.data.rows.sources import read_source
from student_trainer.data.teacher_view import TeacherContext
from student_trainer.data.text.answer import Template, trained
from student_trainer.data.text.clock import Clock
from student_trainer.data.text.encoding import Encoder
from student_trainer.data.text.templates import choose
from student_trainer.errors import DataError
from teacher_wire.core.errors import LimitError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.generate.messages import GenerateCall, PromptBatch, Sample, SamplingSpec, check_generate

# Why an answer is not written: nobody could learn from it.
REASONS = ("cut_off", "empty", "no_text", "control_token", "template", "too_long")


@dataclass(frozen=True)
class AskedRow:
    """A row to be answered.

    Attributes:
        row, conversation: as it was read.
        prompt_ids: that the teacher is asked by.
    """

    row: Row
    conversation: Conversation
    prompt_ids: list[int]


@dataclass(frozen=True)
class Verdict:
    """What becomes of one answer: a conversation, or a reason and what is wrong in words."""

    text: str
    conversation: Conversation | None = None
    retokenized: bool = False
    reason: str = ""
    detail: str = ""


class RowReader:
    """Rows to prompts, and samples to rows, by the template of the run.

    Attributes:
        stop_ids: of the template's end of turn, beside the teacher's own.
    """

    def __init__(self, config: TrainConfig, tokenizer: Any, settings: GenerateConfig) -> None:
        self._config, self._data = config, config.data
        self._settings = settings
        self.tokenizer = tokenizer
        clock = Clock(config.data.date, explicit=config.data.date is not None)
        self.template: Template = choose(
            config.data.template, tokenizer, kwargs=config.data.template_kwargs, clock=clock
        )
        self._encoder = Encoder(tokenizer, self.template)
        self._context = None if config.context is None else TeacherContext(**config.context.model_dump())
        self._added = set(tokenizer.added_tokens_decoder)
        self.stop_ids = self._ends()

    def _ends(self) -> tuple[int, ...]:
        """The token behind an answer, if that is one of its own."""
        talk = Conversation((Turn("user", "a"), Turn("assistant", "b")))
        [[sequence]] = self._encoder.encode([self.template.answers(talk, "last")], "last")
        last = int(sequence.token_ids[-1])
        return (last,) if last in self._added else ()

    def read(self) -> tuple[list[AskedRow], Intake]:
        """Every row of `data.train` that is to be answered, in order.

        Raises:
            DataError: as reading rows for training.
        """
        intake = Intake(self._data.bad_rows)
        found: list[AskedRow] = []
        for source in map(source_of, self._data.train):
            rows = read_source(source, intake)
            if self._context is not None:
                rows = [replace(row, beside=frozenset({self._context.field})) for row in rows]
            _, pairs = read_rows(rows, source.format, self._data.system_prompt or "", intake, source.path)
            kept, prompts = [], []
            for row, conversation in pairs:
                if not trained(conversation, "last"):
                    continue  # its last answer has the weight 0: nobody would learn another one
                try:
                    asked = conversation
                    if self._context is not None:
                        asked = self._context.informed(row, conversation, "last")
                    prompts.append(self.template.prompt(replace(asked, turns=asked.turns[:-1])))
                    kept.append((row, conversation))
                except DataError as error:
                    intake.leave_out(error if error.line else row.error(str(error)), row.fields)
            ids = self._encoder.prompts(prompts)
            found += [AskedRow(row, talk, prompt) for (row, talk), prompt in zip(kept, ids, strict=True)]
        if not found:
            raise DataError("data.train holds no row whose last answer is learned", field="data.train")
        return found, intake

    def within(self, asked: list[AskedRow], info: TeacherInfo, spec: SamplingSpec, intake: Intake) -> list[AskedRow]:
        """The rows that the teacher's limits allow; the others are bad rows.

        Raises:
            TeacherWireError: no row at all could be asked so.
            DataError: a row is above the limits, and bad rows are refused.
        """
        shortest = min(asked, key=lambda one: len(one.prompt_ids))
        check_generate(GenerateCall(info.name, "", spec, PromptBatch.pack([shortest.prompt_ids])), info)
        kept = []
        for one in asked:
            try:
                check_generate(GenerateCall(info.name, "", spec, PromptBatch.pack([one.prompt_ids])), info)
                kept.append(one)
            except LimitError as error:
                said = f"its prompt of {len(one.prompt_ids):,} tokens cannot be answered: {error}"
                intake.leave_out(one.row.error(f"{said}; lower generate.max_new_tokens"), one.row.fields)
        return kept

    def verdict(self, one: AskedRow, sample: Sample) -> Verdict:
        """Whether an answer can be learned from, as `train` would read it."""
        ids = sample.token_ids_n.tolist()
        if sample.finish == "length":
            text = self._decoded(ids)
            return Verdict(text, reason="cut_off", detail=f"no end within {self._settings.max_new_tokens} tokens")
        if ids and ids[-1] in self._added:
            ids = ids[:-1]
        text = self._decoded(ids)
        if not text.strip():
            return Verdict(text, reason="empty", detail="nothing but its end was written")
        if "\ufffd" in text:
            return Verdict(text, reason="no_text", detail="its tokens are no whole characters")
        if any(token in self._added and self.tokenizer.added_tokens_decoder[token].special for token in ids):
            return Verdict(text, reason="control_token", detail="a control token stands in it")
        before = tuple(replace(turn, loss_weight=0.0, weights=()) if turn.role == "assistant" else turn for turn in one.conversation.turns[:-1])  # fmt: skip
        answer = Turn("assistant", text, loss_weight=one.conversation.turns[-1].loss_weight)
        made = replace(one.conversation, turns=(*before, answer))
        try:
            [[sequence]] = self._encoder.encode([self.template.answers(made, "last")], "last")
        except DataError as error:
            return Verdict(text, reason="template", detail=str(error))
        tokens = sequence.token_ids.size
        if tokens > self._data.max_tokens:
            detail = f"{tokens} tokens with its prompt, above data.max_tokens={self._data.max_tokens}"
            return Verdict(text, reason="too_long", detail=detail)
        again = sequence.token_ids[sequence.loss_mask].tolist()
        return Verdict(text, made, retokenized=again[: len(ids)] != ids)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def row_of(conversation: Conversation, row: Row) -> dict[str, Any]:
    """A row of format `messages`; `conversation` ends with the teacher's answer. Fields that somebody beside the format reads stay."""
    messages = []
    for number, turn in enumerate(conversation.turns):
        message = turn.message
        if turn.role == "assistant" and number < len(conversation.turns) - 1:
            message["weight"] = 0  # the data's own words
        elif turn.loss_weight != 1:
            message["weight"] = turn.loss_weight
        messages.append(message)
    made: dict[str, Any] = {"messages": messages}
    if conversation.tools:
        made["tools"] = [dict(tool) for tool in conversation.tools]
    if conversation.template_kwargs:
        made["chat_template_kwargs"] = dict(conversation.template_kwargs)
    return made | {name: row.fields[name] for name in sorted(row.beside) if name in row.fields}
