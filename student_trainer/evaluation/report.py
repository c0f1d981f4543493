"""Comparison of training arms: statistics, and what report.json, report.md and a console table say of them.

In: `Results` (a value per seed; None for a run that has none). Out: plain data, text, a table; `report_folder` writes them.
Must never pick seeds, hide one, or claim a difference whose interval holds 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from rich.console import Console

from student_trainer.errors import RunError


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
        label: for tables and axes.
        unit: "" for a share.
        lower_is_better: the direction of better.
    """

    label: str
    unit: str
    lower_is_better: bool


METRICS: dict[str, Metric] = {
    "nll_per_byte": Metric("held-out NLL", "nats/byte", lower_is_better=True),
    "kl_to_teacher": Metric("KL to teacher", "nats/token", lower_is_better=True),
    "acc1": Metric("top-1 accuracy", "", lower_is_better=False),
    "acc3": Metric("top-3 accuracy", "", lower_is_better=False),
}
_PER_TOKEN = "nll_per_token"  # of rows without text that has bytes
_KL_TO = "kl_to_"  # and the name of one of several teachers


def metric_of(name: str) -> Metric | None:
    """How a metric is shown; None for a name that is no metric of a comparison."""
    if name == _PER_TOKEN:
        return Metric("held-out NLL", "nats/token", lower_is_better=True)
    if name.startswith(_KL_TO) and len(name) > len(_KL_TO):
        return METRICS.get(name, Metric(f"KL to {name.removeprefix(_KL_TO)}", "nats/token", lower_is_better=True))
    return METRICS.get(name)


class Interval(TypedDict):
    """A paired difference and its 95 % t interval; low and high are None with a single seed."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class CurvePoint:
    """One logged value: `loss` (training) or a key of `METRICS` (held-out) at an optimizer step."""

    arm: str
    seed: int
    step: int
    metric: str
    value: float


@dataclass(frozen=True)
class Results:
    """What the arms reached.

    Attributes:
        arms: arm -> metric -> one value per seed, in the order of `seeds`; None where a run failed or its figure is not finite.
        teacher: the teacher's own value of each metric that has one.
        steps: optimizer steps of every arm.
        seeds: the seeds, equal for every arm, so that differences are paired.
        seconds: wall time of the whole comparison.
        base: the arm that the others are compared with.
        budget: what every arm was given, in words; `steps` in words if empty.
    """

    arms: Mapping[str, Mapping[str, Sequence[float | None]]]
    teacher: Mapping[str, float]
    steps: int
    seeds: Sequence[int]
    seconds: float
    base: str = "sft"
    budget: str = ""

    def __post_init__(self) -> None:
        if self.base not in self.arms:
            raise RunError(f"the base arm {self.base!r} is not among the arms: {', '.join(self.arms)}")
        expected = sorted(self.arms[self.base])
        for arm, metrics in self.arms.items():
            if sorted(metrics) != expected:
                raise RunError(f"arm {arm} has the metrics {sorted(metrics)}, {self.base} has {expected}")
            for name, values in metrics.items():
                if metric_of(name) is None:
                    raise RunError(f"unknown metric {name!r} of arm {arm}; known: {', '.join(METRICS)}")
                if len(values) != len(self.seeds) or not all(v is None or math.isfinite(v) for v in values):
                    raise RunError(f"{arm}.{name} must be a finite value for each of seeds {self.seeds}: {values}")

    @property
    def metrics(self) -> list[str]:
        """The metrics at hand: those of `METRICS` in their order, then the others by name."""
        there = self.arms[self.base]
        return [*(name for name in METRICS if name in there), *sorted(name for name in there if name not in METRICS)]

    @property
    def told_budget(self) -> str:
        """What every arm was given, in words."""
        return self.budget or f"{self.steps} steps"

    def paired(self) -> dict[str, dict[str, Interval]]:
        """arm -> metric -> arm minus base over the seeds that have both values; without the metrics of which no seed has."""
        base = self.arms[self.base]
        found: dict[str, dict[str, Interval]] = {}
        for arm, values in self.arms.items():
            if arm != self.base:
                pairs = {m: self.pairs(values[m], base[m]) for m in self.metrics}
                found[arm] = {m: paired(*zip(*both, strict=True)) for m, both in pairs.items() if both}
        return found

    @staticmethod
    def pairs(arm: Sequence[float | None], base: Sequence[float | None]) -> list[tuple[float, float]]:
        """The values of the seeds that have one on both sides."""
        return [(a, b) for a, b in zip(arm, base, strict=True) if a is not None and b is not None]


def paired(arm_values: Sequence[float], base_values: Sequence[float]) -> Interval:
    """Mean of the paired differences arm - base and its two-sided 95 % t interval with n - 1 degrees of freedom.

    Args:
        arm_values, base_values: a value per seed, the same seeds in the same order.
    Raises:
        RunError: no values, or not as many on both sides.
    """
    if not arm_values or len(arm_values) != len(base_values):
        raise RunError(f"paired values must be as many on both sides: {len(arm_values)} and {len(base_values)}")
    differences = [a - b for a, b in zip(arm_values, base_values, strict=True)]
    mean, count = statistics.fmean(differences), len(differences)
    if count == 1:
        return {"mean": mean, "low": None, "high": None}
    from scipy.special import stdtrit  # Student's t; a third of the import time of scipy.stats, and the same digits

    half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(differences) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def as_json(results: Results) -> dict[str, object]:
    """The object that report.json holds."""
    return {
        "arms": {arm: {m: list(values[m]) for m in results.metrics} for arm, values in results.arms.items()},
        "paired": results.paired(),
        "teacher": dict(results.teacher),
        "steps": results.steps,
        "seeds": list(results.seeds),
        "seconds": results.seconds,
    }


def as_markdown(results: Results, plots: Sequence[str] = ()) -> str:
    """report.md: the reading, the table, the paired differences, all seeds, the plots."""
    seeds = ", ".join(map(str, results.seeds))
    lines = [f"# Comparison of {len(results.arms)} arms", "", reading(results), ""]
    lines += [f"{results.told_budget} per arm, seeds {seeds}, {results.seconds:.0f} s in all.", ""]
    lines += _table(["arm", *(_title(m) for m in results.metrics)], _mean_rows(results))
    lines += [
        "",
        f"Mean ± standard deviation over {len(results.seeds)} {'seed' if len(results.seeds) == 1 else 'seeds'}.",
        "",
    ]
    lines += [f"## Paired difference to {results.base}, 95 % interval", ""]
    differences = results.paired().items()
    rows = [[arm, *(_interval(intervals.get(m)) for m in results.metrics)] for arm, intervals in differences]
    lines += _table(["arm", *(_title(m) for m in results.metrics)], rows)
    lines += ["", "## Every seed", ""]
    each = [
        [arm, str(seed), *(_number(values[m][i]) for m in results.metrics)]
        for arm, values in results.arms.items()
        for i, seed in enumerate(results.seeds)
    ]
    lines += _table(["arm", "seed", *(_title(m) for m in results.metrics)], each)
    lines += [text for plot in plots for text in ("", f"![{Path(plot).stem}]({plot})")]
    return "\n".join(lines) + "\n"


def reading(results: Results) -> str:
    """What the figures say of the first metric, in words a newcomer understands; one sentence per arm."""
    return " ".join(sentences(results)) or f"Only {results.base} was run: there is nothing to compare."


def sentences(results: Results) -> list[str]:
    """The sentences of `reading`, one per arm; none if there is nothing to compare."""
    if not results.metrics:
        return ["No run has a held-out figure yet: there is nothing to compare."]
    name = results.metrics[0]
    metric, base = shown_as(name), _mean(results.arms[results.base][name])
    said = []
    for arm, intervals in results.paired().items():
        difference = intervals.get(name)
        if difference is None or base is None:
            said.append(f"**{arm}** and {results.base} have no seed with a figure of both.")
            continue
        mean, low, high = difference["mean"], difference["low"], difference["high"]
        where = f"{results.base} in {metric.label}"
        size = f"{abs(mean):.3f} {metric.unit}".rstrip() + (f", {abs(mean / base):.1%}" if base else "")
        if low is None or high is None:
            what = f"differs from {where} by {mean:+.3f}, but one seed says nothing about chance"
        elif low <= 0 <= high:
            what = f"shows no certain difference to {where} (95 % interval {low:+.3f} to {high:+.3f})"
        else:
            word = "better" if (mean < 0) == metric.lower_is_better else "worse"
            what = f"is {word} than {where} by {size} (95 % interval {low:+.3f} to {high:+.3f})"
        said.append(f"**{arm}** {what}{_kl_ratio(results, arm)}.")
    return said


def print_table(results: Results, console: Console) -> None:
    """The table of report.md on a console: mean ± sd, and below it the paired difference with its interval."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(f"{results.told_budget}, seeds {', '.join(map(str, results.seeds))}"), title_justify="left"
    )
    table.add_column("arm", no_wrap=True)
    for name in results.metrics:
        metric = shown_as(name)
        arrow = "↓" if metric.lower_is_better else "↑"
        table.add_column(f"{metric.label} {arrow}" + f"\n{metric.unit}" * bool(metric.unit), justify="right")
    differences = results.paired()
    for arm, *cells in _mean_rows(results):
        table.add_row(escape(arm), *cells, style="bold" if arm in differences else None)
        if arm in differences:
            shown = (_coloured(differences[arm].get(m), shown_as(m)) for m in results.metrics)
            table.add_row(escape(f"  minus {results.base}"), *shown)
    console.print(table)


def _mean_rows(results: Results) -> list[list[str]]:
    rows = [[arm, *(_mean_sd(values[m]) for m in results.metrics)] for arm, values in results.arms.items()]
    teacher = [_number(results.teacher[m]) if m in results.teacher else "n/a" for m in results.metrics]
    return [*rows, ["teacher", *teacher]] if results.teacher else rows


def _kl_ratio(results: Results, arm: str) -> str:
    if "kl_to_teacher" not in results.metrics:
        return ""
    base, own = _mean(results.arms[results.base]["kl_to_teacher"]), _mean(results.arms[arm]["kl_to_teacher"])
    known = base is not None and own is not None and base > 0
    return f"; its KL to the teacher is {own / base:.2f} of {results.base}'s" if known else ""  # type: ignore[operator]


def shown_as(name: str) -> Metric:
    """How a metric of `Results` is shown."""
    metric = metric_of(name)
    assert metric is not None, "Results has refused others"
    return metric


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def _title(name: str) -> str:
    metric = shown_as(name)
    return metric.label + f" ({metric.unit})" * bool(metric.unit)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _mean_sd(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "none"
    spread = f" ± {statistics.stdev(there):.4f}" if len(there) > 1 else ""
    missing = f" ({len(there)} of {len(values)} seeds)" if len(there) < len(values) else ""
    return _number(statistics.fmean(there)) + spread + missing


def _interval(difference: Interval | None) -> str:
    if difference is None:
        return "none"
    low, high = difference["low"], difference["high"]
    span = "one seed" if low is None or high is None else f"{low:+.4f}, {high:+.4f}"
    return f"{difference['mean']:+.4f} [{span}]"


def _coloured(difference: Interval | None, metric: Metric) -> str:
    if difference is None:
        return "none"
    low, high = difference["low"], difference["high"]
    text = _interval(difference).replace("[", r"\[").replace(" ", "\n", 1)
    if low is None or high is None or low <= 0 <= high:
        return text
    return f"[{'green' if (high < 0) == metric.lower_is_better else 'red'}]{text}[/]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]
