"""The section `curriculum`: easy rows first, harder ones let in as the run goes on (docs/concepts/method.md 11)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, model_validator

from student_trainer.config.fields import Fraction, Positive
from student_trainer.config.files import Settings
from student_trainer.config.teachers import LabelConfig

Weight = Annotated[float, Field(ge=0, le=100)]


class CurriculumConfig(Settings):
    """How hard a row is, and how fast harder rows are let in (docs/train/curriculum.md).

    A row's difficulty is nll * z(the teacher's negative log-likelihood per token of its answer) + length * z(log of its tokens) + trace_steps *
    z(steps of its trace), z over all rows of data.train. In step s the easiest share c(s) of the rows may come, with
    c(s) = min(1, (start^power + (1 - start^power) * s / steps)^(1 / power)).

    Attributes:
        start: share of the rows that may come in step 0.
        power: exponent of c(s): 1 lets rows in at a constant rate, 2 more of them early.
        steps: optimizer steps until every row may come; null takes half of the run's, written into run.json when the run begins.
        mix: share of the places of a window that go to any row at all until then, against forgetting and against a wrong order.
        nll: weight of the teacher's negative log-likelihood per token in a row's difficulty; 0 leaves it out.
        length: weight of the log of a row's tokens; 0 leaves it out.
        trace_steps: weight of the number of steps of a row's trace; 0 leaves it out.
    """

    start: Annotated[float, Field(gt=0, le=1)] = 0.1
    power: Annotated[float, Field(gt=0, le=16)] = 2.0
    steps: Positive | None = None
    mix: Fraction = 0.1
    nll: Weight = 1.0
    length: Weight = 1.0
    trace_steps: Weight = 0.5

    @model_validator(mode="after")
    def _measures_something(self) -> CurriculumConfig:
        if not (self.nll or self.length or self.trace_steps):
            raise ValueError(
                "nll, length and trace_steps are all 0, so that no row is harder than another: give one of them a weight"
            )
        return self


def check_curriculum(curriculum: CurriculumConfig | None, labels: Sequence[LabelConfig], keeps: Sequence[bool]) -> None:
    """Refuses labels by which rows cannot be put in order.

    Args:
        curriculum: the section; None asks for nothing.
        labels: how the labels of each teacher that is learned from travel.
        keeps: whether each teacher's are kept on disk.

    Raises:
        ValueError: naming the setting, and the way out.
    """
    if curriculum is None or not curriculum.nll:
        return
    for one, kept in zip(labels, keeps, strict=True):
        if one.extra_ids:
            raise ValueError(
                f"curriculum.nll={curriculum.nll:g} reads every row's labels before the first step, and those of labels.extra_ids={one.extra_ids} "
                "depend on the student as it trains: set extra_ids or curriculum.nll to 0"
            )
        if not kept:
            raise ValueError(
                f"curriculum.nll={curriculum.nll:g} reads every row's labels before the first step, and they are not kept for the steps that "
                "follow: set cache.labels to true, or curriculum.nll to 0"
            )
