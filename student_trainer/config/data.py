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
        path: `~` is the home folder; `path#N` (or `sample`) takes N rows.
        format: a key of `data.formats.FORMATS`, or `auto` to recognise it by the fields.
        split, subset: of a folder or hub id.
        columns: name of a field in the rows -> the name it is read by; null leaves the field out on purpose.
        tags: of all of its rows, beside those of `tag_field`: which of several teachers are asked about them.
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
    """What rows of format `trace` become; see `data.trace_rows.TraceTasks` (algorithms.md 7.3)."""

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
        train, eval: sources, in this order.
        template: `chat` (the tokenizer's), `plain`, `auto`, the name of one of a tokenizer's several templates, or a file (./x.jinja).
        template_kwargs: variables of the chat template, such as enable_thinking; a row's own stand before them.
        turns: which answers of a conversation are learned: all, in one sequence where the template allows it (`auto`) or each in its
            own (`each`), or the `last` alone.
        date: the day that a chat template prints; without it, that of the run's first start.
        max_tokens: longest sequence.
        overlong: what to do with a longer one; `drop` counts and reports them.
        bad_rows: what to do with a row that cannot be learned from; `skip` counts such rows and writes them to `bad_rows.jsonl` in the
            run folder.
        traces: what rows of format `trace` become.
        tag_field: of the rows, whose text, or list of texts, are a row's tags: which of several teachers are asked about it
            (`teachers[].tags`). A row without it has the tags of its source alone. null: no field has tags.
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
