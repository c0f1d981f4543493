"""What a teacher wrote, read in the style it was asked for, before anything in it is checked.

In: text; out: a `Draft`, the claims of the text as a `Trace` and where each step and the answer stand in the text, or a `TraceError`.
It decides what the text says and never whether that is right: that is `student_trainer.traces.verify`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from student_trainer.config.traces import Style, TagsConfig
from student_trainer.data.trace_schema import UNCLAIMED, Answer, Evidence, Kind, Step, Trace

Span = tuple[int, int]


@dataclass(frozen=True)
class Draft:
    """A text's claims.

    Attributes:
        trace: steps, quotes and the answer as written; offsets as claimed, or `UNCLAIMED`.
        step_places, answer_place: half-open, in characters of the text; as many places as steps.
    """

    trace: Trace
    step_places: tuple[Span, ...]
    answer_place: Span


@dataclass(frozen=True)
class WrittenStep:
    """A step of a style that asks for no ids: its text, the quotes it rests on, and where the text stands."""

    text: str
    quotes: tuple[str, ...]
    place: Span


@dataclass(frozen=True)
class Reading:
    """How texts of a run are read.

    Attributes:
        style: that the teacher was asked for.
        tags: around the reasoning of free text.
        control: texts of the tokenizer's special tokens, which no free text may hold (the tags excepted).
    """

    style: Style = "quotes"
    tags: TagsConfig = field(default_factory=TagsConfig)
    control: tuple[str, ...] = ()


def draft_of(steps: Sequence[WrittenStep], answer: str, answer_place: Span) -> Draft:
    """A draft with the ids that we give: steps from 1 in their order, each different quote one piece of evidence."""
    ids: dict[str, int] = {}
    for step in steps:
        for quote in step.quotes:
            ids.setdefault(quote, len(ids))
    made = tuple(
        Step(number, kind_of(step), step.text, tuple(dict.fromkeys(ids[quote] for quote in step.quotes)))
        for number, step in enumerate(steps, start=1)
    )
    evidence = tuple(Evidence(number, UNCLAIMED, UNCLAIMED, quote) for quote, number in ids.items())
    return Draft(Trace(made, evidence, Answer(answer, "")), tuple(step.place for step in steps), answer_place)


def kind_of(step: WrittenStep) -> Kind:
    """The kind of a step that states none. Whatever may hold an equation is `compute`, so that its equations are evaluated."""
    if any(character.isdigit() for character in step.text[: max(0, step.text.rfind("="))]):
        return "compute"
    return "extract" if step.quotes else "infer"


def moved(draft: Draft, by: int) -> Draft:
    """The same draft, its places `by` characters further on."""
    steps = tuple((start + by, end + by) for start, end in draft.step_places)
    return replace(draft, step_places=steps, answer_place=(draft.answer_place[0] + by, draft.answer_place[1] + by))
