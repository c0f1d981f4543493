"""The section `data`: sources of rows, how they are rendered, and what becomes of rows that do not fit."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from student_trainer.config.fields import HomeText, Positive, checked_tags
from student_trainer.config.files import Settings

Weight = Annotated[float, Field(ge=0, le=100)]


class SourceConfig(Settings):
    """One file, folder or hub data set (docs/data/rows.md).

    Attributes:
        path: file, folder or hub id. `~` is the home folder; `path#N` takes N rows, the same ones every time.
        format: name of a row format (docs/data/rows.md), or `auto` to recognise it by the fields of the rows.
        sample: number of rows to take, as `path#N` says it; null takes all.
        split: split of a folder or hub id.
        subset: subset (configuration) of a hub id.
        columns: a field's name in the rows -> the name by which it is read; null as the name leaves the field out on purpose.
        tags: tags of all rows of this source, beside those of `tag_field`. They decide which of several teachers are asked about a row.
    """

    path: HomeText
    format: str = "auto"
    sample: Positive | None = None
    split: str = "train"
    subset: str | None = None
    columns: dict[str, str | None] = Field(default_factory=dict)
    tags: tuple[str, ...] = ()

    @field_validator("tags")
    @classmethod
    def _texts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return checked_tags(value)


def listed_sources(value: Any) -> list[Any]:
    """Sources as a config may write them: one stands for a list of one, a path for `{path: ...}`.

    Raises:
        ValueError: it is something else.
    """
    listed = list(value) if isinstance(value, list | tuple) else [value]
    for item in listed:
        if not isinstance(item, str | dict | SourceConfig):
            raise ValueError(f"a source is a path or {{path: ...}}, or a list of these, not {type(item).__name__}")
    return [{"path": item} if isinstance(item, str) else item for item in listed]


class TraceTasksConfig(Settings):
    """What rows of format `trace` become; see `data.trace_rows.TraceTasks` (docs/concepts/method.md 7.3).

    Attributes:
        tasks: tasks made of each trace: `reason` teaches the steps and the answer, `answer` the answer alone.
        reason_prefix: text before the user's last turn that asks for the reasoning; at inference the prefix chooses the task.
        answer_prefix: text before the user's last turn that asks for the answer alone.
        open_tag: text before the steps; take the student's own tag if its template has one.
        close_tag: text behind the steps.
        reason_share: weight of the task `reason` relative to the task `answer`.
        gamma: exponent of the answer's confidence in the weights; 0 ignores confidence.
        answer_weight: weight of the characters of the answer.
        step_weight: weight of the characters of a step.
        evidence_weight: weight of the characters that a step quotes from the prompt.
        markup_weight: weight of numbers, tags and line breaks around the steps.
        evidence_bonus: share by which a step with verified evidence weighs more.
    """

    tasks: Annotated[tuple[Literal["reason", "answer"], ...], Field(min_length=1)] = ("reason", "answer")
    reason_prefix: str = "[reason] "
    answer_prefix: str = "[answer] "
    open_tag: str = "<think>"
    close_tag: str = "</think>"
    reason_share: Weight = 1.0
    gamma: Weight = 1.0
    answer_weight: Weight = 1.0
    step_weight: Weight = 0.5
    evidence_weight: Weight = 0.25
    markup_weight: Weight = 0.1
    evidence_bonus: Weight = 0.2


class DataConfig(Settings):
    """What is learned from.

    Attributes:
        train: sources of training rows, in this order.
        eval: sources of held-out rows, in this order. Needed by `train.eval_steps`, `evaluate` and `compare`.
        template: `chat` (the tokenizer's chat template), `plain`, `auto`, the name of one of a tokenizer's several templates, or a file
            (./x.jinja).
        template_kwargs: variables of the chat template, such as enable_thinking; a row's own values take precedence.
        turns: which answers of a conversation are learned: all of them in one sequence where the template allows it (`auto`), all of them
            in a sequence each (`each`), or only the `last`.
        date: the day that a chat template prints; without it the day of the run's first start, which is kept in run.json.
        system_prompt: system message of conversations that have none; null adds none.
        max_tokens: longest sequence, in tokens of the student.
        overlong: what happens to a longer row: `refuse` ends the run, `drop` leaves the row out, counts it and reports it. No row is ever
            cut.
        bad_rows: what happens to a row that cannot be learned from: `refuse` ends the run, `skip` counts the row and writes it to
            `bad_rows.jsonl` in the run folder.
        traces: how rows of format `trace` become text and weights.
        tag_field: field of the rows whose text, or list of texts, is a row's tags, by which several teachers are chosen
            (`teachers[].tags`). A row without the field has the tags of its source; null reads no field.
    """

    train: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    eval: tuple[SourceConfig, ...] = ()
    template: Annotated[str, Field(min_length=1)] = "auto"
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    turns: Literal["auto", "each", "last"] = "auto"
    date: datetime.date | None = None
    system_prompt: str | None = None
    max_tokens: Annotated[int, Field(ge=2)] = 2048
    overlong: Literal["refuse", "drop"] = "refuse"
    bad_rows: Literal["refuse", "skip"] = "refuse"
    traces: TraceTasksConfig = TraceTasksConfig()
    tag_field: Annotated[str, Field(min_length=1)] | None = None

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _plain_paths(cls, value: Any) -> Any:
        return listed_sources(value)
