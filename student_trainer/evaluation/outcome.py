"""What arms reached, as comparison.json holds it: the one record that a comparison writes and a report reads.

In: a file or its parts; out: a validated `Outcome`, and the `Results` of it that tables and plots are made from. A number that is not
finite is null. Knows no config and no run folder.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from student_trainer.errors import DataError
from student_trainer.evaluation.report import CurvePoint, Results, metric_of

FORMAT = 1
FILE_NAME = "comparison.json"
Figure = Annotated[float, Field(allow_inf_nan=False)] | None
TEACHER = "teacher_"  # before the name of a metric: the teacher's own value, as runs log it
_ON_CURVES = ("loss", "nll_per_byte", "nll_per_token", "kl_to_teacher")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Cost(_Record):
    """What a run, or all of them, took. None is not known.

    Attributes:
        train_s: seconds of optimizer steps, waiting for labels included; without start, measuring and saving.
        wall_s: seconds of the processes, of broken attempts too; with `at_least` a lower bound, since one was killed.
        gpu_hours: `wall_s` times the GPUs of the student; 0 on a machine without.
        teacher_tokens, disk_tokens: tokens whose labels were asked of the teacher, and that were on disk; with `at_least`
            of the attempt that came to the end.
        label_bytes: of these labels as they lie in the label store; not known where labels are not kept.
    """

    train_s: Figure = None
    wall_s: Figure = None
    at_least: bool = False
    gpu_hours: Figure = None
    teacher_tokens: int | None = None
    disk_tokens: int | None = None
    label_bytes: int | None = None


class Layers(_Record):
    """How near the student's layers are to the teacher's, by name of the figure such as `cka_5` (evaluation/layer_similarity.py)."""

    before: dict[str, Figure] = {}
    after: dict[str, Figure] = {}


class RunOutcome(_Record):
    """One arm with one seed.

    Attributes:
        name: of the arm.
        state: `failed` ended with an error, `unfinished` was interrupted or is still at work.
        error: of a failed run, one line.
        metrics: held-out figures of the end.
        curve: log entries.
        settings: what decides what this run computes and is other than in the base arm, by dotted name.
        folder: of the run.
    """

    name: str
    seed: int
    state: Literal["done", "failed", "unfinished"]
    error: str = ""
    steps: int = 0
    metrics: dict[str, Figure] = {}
    curve: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    layers: Layers | None = None
    cost: Cost = Cost()
    folder: str = ""


class Budget(_Record):
    """What the arms were given alike.

    Attributes:
        by: `steps`, `time`, or `nothing` of runs that were not made to be compared.
        minutes: of training, under `time`.
        steps: of each arm.
    """

    by: Literal["steps", "time", "nothing"] = "nothing"
    minutes: Figure = None
    steps: dict[str, int] = {}

    @property
    def told(self) -> str:
        """In words, without the arms."""
        counts = sorted(set(self.steps.values()))
        span = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1]))) if counts else ""
        steps = f"{span} optimizer {'step' if counts == [1] else 'steps'}" if counts else "not known how many steps"
        return f"{self.minutes:g} min of training ({steps})" if self.by == "time" and self.minutes else steps


class Sample(_Record):
    """A prompt and what each model answers, by the model's name."""

    prompt: str
    answers: dict[str, str]
    reference: str | None = None


class Evaluated(_Record):
    """A model of evaluation.json.

    Attributes:
        metrics, speed: figures by name.
        tasks: figures by name, or figures by name of each task.
    """

    name: str
    metrics: dict[str, Any] = {}
    tasks: dict[str, Any] = {}
    speed: dict[str, Any] = {}


class Outcome(_Record):
    """All arms and seeds of a comparison, or of runs that are reported together.

    Attributes:
        base: the arm that others are compared with.
        seconds: wall time of all runs.
        notes: sentences that a reader must know to read the figures.
        config: the resolved settings of the base arm.
    """

    format: Literal[1] = 1  # FORMAT
    title: str = ""
    base: str
    budget: Budget = Budget()
    seeds: list[int]
    seconds: Figure = None
    arms: list[RunOutcome]
    notes: list[str] = []
    samples: list[Sample] = []
    evaluated: list[Evaluated] = []
    config: dict[str, Any] = {}
    versions: dict[str, str] = {}
    cost: Cost = Cost()

    @model_validator(mode="after")
    def _base_is_there(self) -> Outcome:
        if self.base not in self.names:
            raise ValueError(f"base {self.base!r} is none of the arms: {', '.join(self.names) or 'there are none'}")
        [((name, seed), count), *_] = Counter((run.name, run.seed) for run in self.arms).most_common(1)
        if count > 1:
            raise ValueError(f"arm {name!r} with seed {seed} is there twice")
        return self

    @property
    def names(self) -> list[str]:
        """The arms, the base first, then in their order."""
        found = dict.fromkeys(run.name for run in self.arms)
        return [*([self.base] if self.base in found else []), *(name for name in found if name != self.base)]

    @property
    def is_done(self) -> bool:
        """Whether every run came to its end."""
        return all(run.state == "done" for run in self.arms)

    def runs_of(self, arm: str) -> dict[int, RunOutcome]:
        """The runs of an arm by seed."""
        return {run.seed: run for run in self.arms if run.name == arm}

    def results(self) -> Results:
        """The values per arm, metric and seed, None where there is none; metrics that a run alone has are in all arms."""
        metrics = dict.fromkeys(
            name for run in self.arms for name, value in run.metrics.items() if metric_of(name) and value is not None
        )
        if "nll_per_byte" in metrics:  # the same figure in another unit
            metrics.pop("nll_per_token", None)
        values: dict[str, dict[str, list[float | None]]] = {}
        for arm in self.names:
            runs = self.runs_of(arm)
            values[arm] = {
                name: [runs[seed].metrics.get(name) if seed in runs else None for seed in self.seeds]
                for name in metrics
            }
        steps = max([run.steps for run in self.arms], default=0)
        return Results(
            values, self.teacher(), steps, self.seeds, self.seconds or 0.0, base=self.base, budget=self.budget.told
        )

    def teacher(self) -> dict[str, float]:
        """The teacher's own figures, as the last run that has them logged them; nothing where runs disagree about them."""
        found: dict[str, set[float]] = {}
        for run in self.arms:
            for name, value in run.metrics.items():
                if name.startswith(TEACHER) and value is not None:
                    found.setdefault(name.removeprefix(TEACHER), set()).add(round(value, 6))
        agreed = {name: values.pop() for name, values in found.items() if len(values) == 1}
        return {**agreed, "kl_to_teacher": 0.0} if agreed else {}

    def points(self) -> list[CurvePoint]:
        """The curves of all runs; what is not finite is a gap."""
        return [point for run in self.arms for point in points_of(run.name, run.seed, run.curve)]


def points_of(arm: str, seed: int, curve: list[dict[str, Any]]) -> Iterator[CurvePoint]:
    """Log entries of a run as points; the held-out figures have `eval_` before their names in a log."""
    for entry in curve:
        step = entry.get("step")
        for metric in _ON_CURVES:
            value = entry.get(metric if metric == "loss" else f"eval_{metric}")
            if isinstance(value, int | float) and isinstance(step, int | float) and math.isfinite(value):
                yield CurvePoint(arm, seed, int(step), metric, float(value))


def finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The same with None for numbers that are not finite, as the file has it."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in figures.items()}


def read_outcome(file: Path) -> Outcome:
    """A comparison.json.

    Raises:
        DataError: it cannot be read, or is none; names the first entry that is wrong.
    """
    try:
        return Outcome.model_validate_json(file.read_bytes())
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", file=str(file)) from error
    except ValidationError as error:
        raise DataError(f"is no {FILE_NAME} of format {FORMAT}: {first_of(error)}", file=str(file)) from error


def first_of(error: ValidationError) -> str:
    """The first complaint of pydantic as half a sentence that names its place."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])
