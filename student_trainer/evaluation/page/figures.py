"""What a report says in numbers: the tables of an outcome, as cells that keep the value they show.

In: an `Outcome` and evaluations; out: tables for the page and for Markdown, so that both show the same. Draws and escapes nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from student_trainer.evaluation.outcome import Cost, Evaluated, Outcome, RunOutcome
from student_trainer.evaluation.page.text import short
from student_trainer.evaluation.report import Interval, Metric, Results, shown_as
from student_trainer.evaluation.tasks.result import label_of

MOST_RUNS = 400  # rows of the table of all seeds
_NONE = "none"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what is shown.
        value: the number that it shows; None for text.
        key: what the number is of, `kind/arm/metric[/seed]`, for whoever reads the page by program.
        mark: `better`, `worse`, `bad` or empty.
        hint: shown beside it, smaller.
    """

    text: str
    value: float | None = None
    key: str = ""
    mark: str = ""
    hint: str = ""

    @property
    def exact(self) -> str:
        """The value as JSON has it."""
        return "" if self.value is None else repr(self.value)


@dataclass(frozen=True)
class Table:
    """Cells under headings; the first cell of a row is its name.

    Attributes:
        notes: sentences below it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default=())


def number(value: float | None, digits: int = 4) -> str:
    """A figure as people read it; `none` for None."""
    if value is None or not math.isfinite(value):
        return _NONE
    if value and not 0.001 <= abs(value) < 100_000:
        return f"{value:.3g}"
    return f"{value:,.{digits}f}"


def arms_table(outcome: Outcome, results: Results) -> Table:
    """Mean ± standard deviation of every metric, and minutes of training; the teacher's own figures at the end."""
    header = ["arm", *(_heading(shown_as(m)) for m in results.metrics), "training"]
    rows = []
    for arm, values in results.arms.items():
        runs = outcome.runs_of(arm).values()
        rows.append([_name(arm), *(_mean(arm, m, values[m]) for m in results.metrics), _minutes(arm, runs)])
    if results.teacher:
        cells = (
            Cell(number(v), v, f"teacher/teacher/{m}") if (v := results.teacher.get(m)) is not None else Cell("")
            for m in results.metrics
        )
        rows.append([Cell("teacher"), *cells, Cell("")])
    count = len(results.seeds)
    return Table("Arms", header, rows, [f"Mean ± standard deviation over {count} seeds." if count > 1 else "One seed."])


def differences_table(outcome: Outcome, results: Results) -> Table | None:
    """Paired differences to the base with their intervals; None if there is nothing to compare."""
    found = results.paired()
    if not any(found.values()):
        return None
    header = ["arm", *(_heading(shown_as(m)) for m in results.metrics)]
    rows = [
        [_name(arm), *(_difference(arm, m, intervals.get(m)) for m in results.metrics)]
        for arm, intervals in found.items()
    ]
    notes = ["In brackets the 95 % interval of the mean of the differences, paired by seed (Student's t)."]
    if len(results.seeds) == 1:
        notes = ["One seed: a difference without an interval says nothing about chance."]
    return Table(f"Paired difference to {outcome.base}", header, rows, notes)


def seeds_table(outcome: Outcome, results: Results) -> Table:
    """Every run."""
    header = ["run", "seed", "state", "steps", *(_heading(shown_as(m)) for m in results.metrics)]
    rows = []
    for run in outcome.arms[:MOST_RUNS]:
        marked = "" if run.state == "done" else "bad"
        figures = (
            Cell(number(value), value, f"seed/{run.name}/{m}/{run.seed}")
            if (value := run.metrics.get(m)) is not None
            else Cell(_NONE)
            for m in results.metrics
        )
        rows.append(
            [_name(run.name), Cell(str(run.seed)), Cell(run.state, mark=marked), Cell(f"{run.steps:,}"), *figures]
        )
    more = len(outcome.arms) - MOST_RUNS
    return Table("Every run", header, rows, [f"{more:,} more runs are not shown."] if more > 0 else [])


def cost_table(outcome: Outcome) -> Table:
    """What each arm took, over its seeds, and all of them."""
    header = [
        "arm",
        "runs",
        "training",
        "process",
        "GPU hours",
        "tokens from teacher",
        "tokens from disk",
        "labels",
        "tokens/s",
    ]
    rows = []
    for arm in outcome.names:
        runs = list(outcome.runs_of(arm).values())
        rows.append(
            [_name(arm), Cell(str(len(runs))), *_costs(arm, summed(run.cost for run in runs)), _rate(arm, runs)]
        )
    if len(outcome.arms) > 1:
        rows.append(
            [
                Cell("all"),
                Cell(str(len(outcome.arms))),
                *_costs("all", summed(run.cost for run in outcome.arms)),
                Cell(""),
            ]
        )
    notes = [
        "Training: optimizer steps and waiting for labels. Process: loading, measuring and saving too. Labels: bytes read from the label store or written to it."
    ]
    if any(run.cost.at_least for run in outcome.arms):
        notes.append(
            "Marked ≥: a run was broken off, and what that attempt took is counted only up to its last checkpoint."
        )
    return Table("Cost", header, rows, notes)


def evaluated_table(evaluated: Sequence[Evaluated]) -> Table | None:
    """The models of evaluation.json, a column each."""
    if not evaluated:
        return None
    rows = []
    for group in ("metrics", "tasks", "speed"):
        held: list[Mapping[str, Any]] = [getattr(one, group) for one in evaluated]
        for name in dict.fromkeys(name for figures in held for name in figures):
            if any(isinstance(figures.get(name), int | float | Mapping) for figures in held):
                cells = [_evaluated(one, group, name) for one in evaluated]
                # A cell of bytes has a unit of its own.
                label = name if group == "tasks" else label_of(name).removesuffix(", GiB")
                label = label.replace("_", " ") if group == "speed" else label
                rows.append([Cell(short(label), hint=group if group != "metrics" else ""), *cells])
    return Table("Evaluation", ["", *(short(one.name) for one in evaluated)], rows) if rows else None


def settings_table(outcome: Outcome) -> Table | None:
    """What an arm has otherwise than the base."""
    rows = []
    for arm in outcome.names[1:]:
        settings: dict[str, Any] = {}
        for run in outcome.runs_of(arm).values():
            settings |= run.settings
        rows += [[_name(arm), Cell(short(name)), Cell(short(value, 200))] for name, value in settings.items()]
    return Table(f"Settings other than in {outcome.base}", ["arm", "setting", "value"], rows) if rows else None


def summed(costs: Iterable[Cost]) -> Cost:
    """The sums of what is known."""
    every = list(costs)

    def over(name: str) -> Any:
        known = [value for cost in every if (value := getattr(cost, name)) is not None]
        return sum(known) if known else None

    names = ("train_s", "wall_s", "gpu_hours", "teacher_tokens", "disk_tokens", "label_bytes")
    return Cost(at_least=any(cost.at_least for cost in every), **{name: over(name) for name in names})


def told_bytes(count: float) -> str:
    """With the unit that fits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,.0f} B"


def _name(arm: str) -> Cell:
    return Cell(short(arm, 64))


def _heading(metric: Metric) -> str:
    arrow = "↓" if metric.lower_is_better else "↑"
    return f"{metric.label} {arrow}" + f" ({metric.unit})" * bool(metric.unit)


def _mean(arm: str, metric: str, values: Sequence[float | None]) -> Cell:
    there = [value for value in values if value is not None]
    if not there:
        return Cell(_NONE, mark="bad")
    mean = statistics.fmean(there)
    spread = f"± {number(statistics.stdev(there))}" if len(there) > 1 else ""
    missing = f"{len(there)} of {len(values)} seeds" if len(there) < len(values) else ""
    return Cell(number(mean), mean, f"mean/{arm}/{metric}", hint=", ".join(part for part in (spread, missing) if part))


def _minutes(arm: str, runs: Iterable[RunOutcome]) -> Cell:
    known = [run.cost.train_s for run in runs if run.cost.train_s is not None]
    if not known:
        return Cell("not known")
    mean = statistics.fmean(known)
    return Cell(_span(mean), mean, f"mean/{arm}/train_s", hint="per run" if len(known) > 1 else "")


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.2f} h"


def _difference(arm: str, metric: str, interval: Interval | None) -> Cell:
    if interval is None:
        return Cell(_NONE, mark="bad")
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    if low is None or high is None:
        return Cell(f"{mean:+.4f}", mean, f"difference/{arm}/{metric}", hint="one seed")
    mark = "" if low <= 0 <= high else "better" if (high < 0) == shown_as(metric).lower_is_better else "worse"
    return Cell(f"{mean:+.4f}", mean, f"difference/{arm}/{metric}", mark, f"[{low:+.4f}, {high:+.4f}]")


def _costs(arm: str, cost: Cost) -> list[Cell]:
    least = "≥ " if cost.at_least else ""
    shown = {
        "train_s": _span, "wall_s": _span, "gpu_hours": lambda hours: number(hours, 3),
        "teacher_tokens": lambda count: f"{count:,}", "disk_tokens": lambda count: f"{count:,}", "label_bytes": told_bytes,
    }  # fmt: skip
    cells = []
    for name, form in shown.items():
        value = getattr(cost, name)
        told = "not known" if value is None else f"{least}{form(value)}"
        cells.append(Cell(told, value, f"cost/{arm}/{name}" if value is not None else ""))
    return cells


def _rate(arm: str, runs: Sequence[RunOutcome]) -> Cell:
    rates = [
        value for run in runs for entry in run.curve if isinstance(value := entry.get("tokens_per_s"), int | float)
    ]
    return (
        Cell(f"{statistics.fmean(rates):,.0f}", statistics.fmean(rates), f"cost/{arm}/tokens_per_s")
        if rates
        else Cell("not known")
    )


def _evaluated(one: Evaluated, group: str, name: str) -> Cell:
    found = getattr(one, group).get(name)
    spread = None
    if isinstance(found, Mapping):  # a task
        task: Mapping[str, Any] = found
        found, spread = task.get("value"), task.get("stderr")
    if isinstance(found, bool) or not isinstance(found, int | float):
        return Cell("n/a")
    text = (
        told_bytes(found)
        if name.endswith("_bytes")
        else number(found, 1 if group == "speed" or abs(found) >= 100 else 4)
    )
    return Cell(
        text,
        float(found),
        f"{group}/{one.name}/{name}",
        hint=f"± {spread:.4f}" if isinstance(spread, int | float) else "",
    )
