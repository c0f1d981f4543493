"""What a report holds, before it is a page or Markdown: each outcome with its tables and charts, and sample answers of all.

In: outcomes, evaluations and samples; out: `Report`. Everything is bounded here, and says what it leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from student_trainer.evaluation.outcome import Evaluated, Outcome, Sample
from student_trainer.evaluation.page import charts, figures
from student_trainer.evaluation.page.text import Clipped, clipped, short
from student_trainer.evaluation.report import Results, sentences

MOST_SAMPLES, PROMPT_CHARS, ANSWER_CHARS, CONFIG_CHARS, MOST_MODELS = 24, 2_000, 4_000, 40_000, 8
_MOST_ERRORS, _MOST_CHARTS, _MOST_LAYERS = 20, 24, 12


@dataclass(frozen=True)
class Answer:
    """What one model answers."""

    model: str
    text: Clipped


@dataclass(frozen=True)
class ShownSample:
    """A prompt and its answers, side by side."""

    prompt: Clipped
    answers: Sequence[Answer]
    reference: Clipped | None


@dataclass(frozen=True)
class LayerCharts:
    """The layers of one run."""

    run: str
    charts: Sequence[charts.Chart]


@dataclass(frozen=True)
class Part:
    """One outcome on the page.

    Attributes:
        reading: what the figures say in words, a sentence per arm.
        states: runs that are not done, as lines.
        legend: arms with the numbers of their colours.
    """

    title: str
    reading: Sequence[str]
    is_done: bool
    done: int
    runs: int
    budget: str
    seeds: str
    states: Sequence[str]
    notes: Sequence[str]
    legend: Sequence[tuple[str, int]]
    arms: figures.Table
    differences: figures.Table | None
    intervals: Sequence[charts.Chart]
    curves: Sequence[charts.Chart]
    layers: Sequence[LayerCharts]
    evaluated: figures.Table | None
    every: figures.Table
    cost: figures.Table
    settings: figures.Table | None
    versions: Sequence[tuple[str, str]]
    config: Clipped
    has_figures: bool


@dataclass(frozen=True)
class Report:
    """All of it.

    Attributes:
        sample_note: how many samples are not shown; empty for none.
    """

    title: str
    parts: Sequence[Part]
    evaluated: figures.Table | None = None
    samples: Sequence[ShownSample] = field(default=())
    sample_note: str = ""


def report_of(
    outcomes: Sequence[Outcome], evaluated: Sequence[Evaluated] = (), samples: Sequence[Sample] = ()
) -> Report:
    """A report.

    Args:
        outcomes: in order, at least one.
        evaluated, samples: of evaluations that belong to no outcome; those of outcomes are in them.
    """
    every = [*samples, *(sample for outcome in outcomes for sample in outcome.samples)]
    left = len(every) - MOST_SAMPLES
    return Report(
        title=short(" · ".join(outcome.title or outcome.base for outcome in outcomes), 120),
        parts=[_part(outcome) for outcome in outcomes],
        evaluated=figures.evaluated_table(evaluated),
        samples=[_sample(sample) for sample in every[:MOST_SAMPLES]],
        sample_note=f"{left:,} more samples are in the files, and not shown." if left > 0 else "",
    )


def _part(outcome: Outcome) -> Part:
    results = outcome.results()
    states = [
        f"{run.name}, seed {run.seed}: {run.state}, {run.steps:,} steps{f': {run.error}' if run.error else ''}"
        for run in outcome.arms
        if run.state != "done"
    ]
    more = len(states) - _MOST_ERRORS
    shown = [short(state, 600) for state in states[:_MOST_ERRORS]] + [f"… and {more:,} more runs"] * (more > 0)
    drawn = charts.curves(outcome)
    layered = [
        LayerCharts(f"{short(run.name, 64)}, seed {run.seed}", found)
        for run in outcome.arms
        if run.layers is not None and run.seed == outcome.seeds[0] and (found := charts.layers(run.layers))
    ]
    notes = [short(note, 600) for note in outcome.notes[:_MOST_ERRORS]]
    notes += [f"{len(drawn) - _MOST_CHARTS} more curves are not drawn."] * (len(drawn) > _MOST_CHARTS)
    notes += [f"The layers of {len(layered) - _MOST_LAYERS} more runs are not drawn."] * (len(layered) > _MOST_LAYERS)
    return Part(
        title=short(outcome.title or outcome.base, 120),
        reading=_reading(outcome, results),
        is_done=outcome.is_done,
        done=sum(run.state == "done" for run in outcome.arms),
        runs=len(outcome.arms),
        budget=outcome.budget.told,
        seeds=short(", ".join(map(str, outcome.seeds)), 120),
        states=shown,
        notes=notes,
        legend=[(short(arm, 64), charts.series_of(outcome, arm)) for arm in outcome.names],
        arms=figures.arms_table(outcome, results),
        differences=figures.differences_table(outcome, results),
        intervals=charts.intervals(outcome, results),
        curves=drawn[:_MOST_CHARTS],
        layers=layered[:_MOST_LAYERS],
        evaluated=figures.evaluated_table(outcome.evaluated),
        every=figures.seeds_table(outcome, results),
        cost=figures.cost_table(outcome),
        settings=figures.settings_table(outcome),
        versions=[(short(name), short(value)) for name, value in outcome.versions.items()],
        config=clipped(_yaml(outcome.config), CONFIG_CHARS),
        has_figures=bool(results.metrics),
    )


def _reading(outcome: Outcome, results: Results) -> list[str]:
    if len(outcome.names) == 1:
        return []
    told = sentences(results)
    more = len(told) - _MOST_ERRORS
    return [short(one.replace("**", ""), 400) for one in told[:_MOST_ERRORS]] + [f"… and {more} more arms."] * (
        more > 0
    )


def _yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else ""


def _sample(sample: Sample) -> ShownSample:
    answers = [Answer(short(name, 64), clipped(text, ANSWER_CHARS)) for name, text in sample.answers.items()]
    reference = None if sample.reference is None else clipped(sample.reference, ANSWER_CHARS)
    return ShownSample(clipped(sample.prompt, PROMPT_CHARS), answers[:MOST_MODELS], reference)
