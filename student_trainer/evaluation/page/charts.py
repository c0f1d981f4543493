"""Charts of a report as inline SVG, coloured by the page's own classes so that they follow its theme.

In: points and intervals; out: SVG text in which every string is escaped. Must never smooth, nor share an axis between losses that
measure different things.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from student_trainer.evaluation.outcome import Layers, Outcome
from student_trainer.evaluation.page.text import short
from student_trainer.evaluation.report import Results, shown_as

SERIES = 6  # colours of the style sheet
MOST_POINTS = 240  # of a line
WIDTH, HEIGHT = 380, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40
_HELDOUT = ("nll_per_byte", "nll_per_token", "kl_to_teacher", "acc1")
_ROW = 26  # height of a row of an interval or a layer
_LAYERS = {
    "cka": ("Hidden states: debiased CKA", "higher is nearer"),
    "hidden_loss": ("Hidden states: objective", "lower is nearer"),
    "attention_loss": ("Attention: objective", "lower is nearer"),
    "ffn_loss": ("FFN: objective", "lower is nearer"),
}
_MOST_BLOCKS = 48

Value = float | None


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        title: above it.
        svg: the picture.
        note: below it; empty for none.
    """

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class _Line:
    """Mean over seeds by step, and the range of the seeds; None where no seed has a number."""

    steps: list[int]
    mean: list[Value]
    low: list[Value]
    high: list[Value]
    every: int

    @classmethod
    def of(cls, curves: Sequence[Sequence[Mapping[str, object]]], key: str) -> _Line:
        found: dict[int, list[float]] = {}
        for curve in curves:
            for entry in curve:
                step, value = entry.get("step"), entry.get(key)
                if key in entry and isinstance(step, int | float):
                    values = found.setdefault(int(step), [])
                    if isinstance(value, int | float) and math.isfinite(value):
                        values.append(float(value))
        steps = sorted(found)
        every = max(1, math.ceil(len(steps) / MOST_POINTS))
        kept = [step for place, step in enumerate(steps) if place % every == 0 or place == len(steps) - 1]

        def of(pick: object) -> list[Value]:
            return [pick(found[step]) if found[step] else None for step in kept]  # type: ignore[operator]

        return cls(kept, of(lambda v: sum(v) / len(v)), of(min), of(max), every)

    @property
    def is_empty(self) -> bool:
        return all(value is None for value in self.mean)


def curves(outcome: Outcome) -> list[Chart]:
    """Held-out curves of all arms, a chart per metric, and the training loss, a chart per arm."""
    of_arm = {arm: [run.curve for run in outcome.runs_of(arm).values()] for arm in outcome.names}
    teacher = outcome.teacher()
    charts: list[Chart] = []
    for metric in _HELDOUT:
        lines = {arm: _Line.of(found, f"eval_{metric}") for arm, found in of_arm.items()}
        lines = {arm: line for arm, line in lines.items() if len(line.steps) > 1 and not line.is_empty}
        if lines and not (
            metric == "nll_per_token" and any(chart.title.startswith("held-out NLL") for chart in charts)
        ):
            shown = shown_as(metric)
            level = teacher.get(metric) if metric != "kl_to_teacher" else None
            charts.append(_lines(f"{shown.label}", shown.unit or "share of tokens", outcome, lines, level))
    for arm, found in of_arm.items():
        line = _Line.of(found, "loss")
        if len(line.steps) > 1 and not line.is_empty:
            charts.append(_lines(f"training loss of {short(arm, 40)}", "nats per token", outcome, {arm: line}, None))
    return charts


def series_of(outcome: Outcome, arm: str) -> int:
    """The number of an arm's colour."""
    return outcome.names.index(arm) % SERIES


def _lines(title: str, unit: str, outcome: Outcome, lines: Mapping[str, _Line], level: float | None) -> Chart:
    values = [v for line in lines.values() for part in (line.low, line.high) for v in part if v is not None]
    values += [level] if level is not None else []
    steps = [step for line in lines.values() for step in line.steps]
    x, y = _Axis(min(steps), max(steps), _LEFT, WIDTH - _RIGHT), _Axis(min(values), max(values), HEIGHT - _BOTTOM, _TOP)
    parts = [*_frame(x, y, "optimizer step", unit)]
    for arm, line in lines.items():
        style = series_of(outcome, arm)
        for piece in _pieces(line):
            band = [(x(line.steps[i]), y(line.high[i] or 0.0)) for i in piece]
            band += [(x(line.steps[i]), y(line.low[i] or 0.0)) for i in reversed(piece)]
            mean = [(x(line.steps[i]), y(line.mean[i] or 0.0)) for i in piece]
            if len(outcome.seeds) > 1 and len(piece) > 1:
                parts.append(Markup('<polygon class="band s{}" points="{}"/>').format(style, _points(band)))
            if len(piece) > 1:
                parts.append(Markup('<polyline class="line s{}" points="{}"/>').format(style, _points(mean)))
            else:
                parts.append(Markup('<circle class="dot s{}" cx="{}" cy="{}" r="2.5"/>').format(style, *mean[0]))
    if level is not None:
        parts.append(
            Markup('<line class="teacher" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                _LEFT, WIDTH - _RIGHT, y(level), y(level)
            )
        )
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="end">teacher</text>').format(
                WIDTH - _RIGHT, y(level) - 4
            )
        )
    every = max(line.every for line in lines.values())
    gaps = any(value is None for line in lines.values() for value in line.mean)
    notes = [f"One in {every} log entries is drawn."] * (every > 1) + ["A gap is a value that is not finite."] * gaps
    return Chart(title, _svg(WIDTH, HEIGHT, title, parts), " ".join(notes))


def _pieces(line: _Line) -> list[list[int]]:
    """Runs of places that have numbers."""
    pieces: list[list[int]] = [[]]
    for place, value in enumerate(line.mean):
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append(place)
    return [piece for piece in pieces if piece]


def intervals(outcome: Outcome, results: Results) -> list[Chart]:
    """The paired differences of each metric with their intervals, an arm a row, around the line of no difference."""
    charts = []
    found = results.paired()
    for metric in results.metrics:
        rows = {arm: held[metric] for arm, held in found.items() if metric in held}
        if not rows:
            continue
        shown = shown_as(metric)
        ends = [
            v
            for interval in rows.values()
            for v in (interval["low"], interval["high"], interval["mean"])
            if v is not None
        ]
        height = _TOP + _ROW * len(rows) + _BOTTOM
        left = min(150, 16 + 6.3 * max(len(short(arm, 20)) for arm in rows))
        x = _Axis(*_padded(min(0.0, *ends), max(0.0, *ends)), left, WIDTH - _RIGHT)
        parts = [
            *_ticks_x(x, _TOP, height - _BOTTOM),
            _label_x(f"minus {short(outcome.base, 24)}" + f", {shown.unit}" * bool(shown.unit), left, height),
        ]
        parts.append(
            Markup('<line class="zero" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(x(0.0), _TOP, height - _BOTTOM)
        )
        for place, (arm, interval) in enumerate(rows.items()):
            middle = _TOP + _ROW * (place + 0.5)
            style = series_of(outcome, arm)
            parts.append(
                Markup('<text class="name" x="{}" y="{}" text-anchor="end">{}</text>').format(
                    left - 8, middle + 4, short(arm, 20)
                )
            )
            if interval["low"] is not None and interval["high"] is not None:
                parts.append(
                    Markup('<line class="whisker s{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                        style, x(interval["low"]), x(interval["high"]), middle, middle
                    )
                )
            parts.append(
                Markup('<circle class="dot s{}" cx="{}" cy="{}" r="4"/>').format(style, x(interval["mean"]), middle)
            )
        better = "left" if shown.lower_is_better else "right"
        charts.append(
            Chart(shown.label, _svg(WIDTH, height, f"difference in {shown.label}", parts), f"Better is {better}.")
        )
    return charts


def layers(of: Layers) -> list[Chart]:
    """A chart per kind of figure, a row per block of the student from before (grey) to after."""
    charts = []
    both = {name: (a, b) for name, a in of.before.items() if a is not None and (b := of.after.get(name)) is not None}
    for kind, (title, sense) in _LAYERS.items():
        rows = sorted(
            (int(block), both[name])
            for name in both
            for head, _, block in [name.rpartition("_")]
            if head == kind and block.isdigit()
        )
        left_out, rows = len(rows) - _MOST_BLOCKS, rows[:_MOST_BLOCKS]
        if not rows:
            continue
        height, left = _TOP + _ROW * len(rows) + _BOTTOM, 70
        ends = [end for _, pair in rows for end in pair]
        x = _Axis(min(0.0, *ends), max(*ends, 1.0 if kind == "cka" else 0.0), left, WIDTH - _RIGHT)
        parts = [*_ticks_x(x, _TOP, height - _BOTTOM), _label_x(sense, left, height)]
        for place, (block, (before, after)) in enumerate(rows):
            middle = _TOP + _ROW * (place + 0.5)
            parts.append(
                Markup('<text class="name" x="{}" y="{}" text-anchor="end">block {}</text>').format(
                    left - 8, middle + 4, block
                )
            )
            parts.append(
                Markup('<line class="way" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                    x(before), x(after), middle, middle
                )
            )
            parts.append(Markup('<circle class="before" cx="{}" cy="{}" r="4.5"/>').format(x(before), middle))
            parts.append(Markup('<circle class="dot s1" cx="{}" cy="{}" r="4.5"/>').format(x(after), middle))
        note = f"{left_out} more blocks are not drawn." if left_out > 0 else ""
        charts.append(Chart(title, _svg(WIDTH, height, title, parts), note))
    return charts


def _padded(low: float, high: float) -> tuple[float, float]:
    """A little more on both sides, so that what ends there is seen whole."""
    more = 0.06 * (high - low)
    return low - more, high + more


class _Axis:
    """A range of values on a range of the picture, widened to ticks at its ends where both ends are the same."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if low == high:
            low, high = (low - 0.5, high + 0.5) if low == 0 else (low - abs(low) * 0.1, high + abs(high) * 0.1)
        self.low, self.high, self._start, self._end = low, high, start, end

    def __call__(self, value: float) -> float:
        return round(self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start), 1)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values within the range."""
        from matplotlib.ticker import MaxNLocator

        slack = 1e-9 * (self.high - self.low)
        found = MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        return [float(tick) for tick in found if self.low - slack <= tick <= self.high + slack]


def _frame(x: _Axis, y: _Axis, x_label: str, y_label: str) -> list[Markup]:
    parts = []
    for tick in y.ticks(5):
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                _LEFT, WIDTH - _RIGHT, y(tick), y(tick)
            )
        )
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
                _LEFT - 6, y(tick) + 4, _told(tick)
            )
        )
    parts += _ticks_x(x, HEIGHT - _BOTTOM, HEIGHT - _BOTTOM, whole=True)
    parts.append(_label_x(x_label, _LEFT, HEIGHT))
    parts.append(
        Markup('<text class="axis" transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
            (HEIGHT - _BOTTOM + _TOP) / 2, y_label
        )
    )
    return parts


def _ticks_x(x: _Axis, top: float, bottom: float, *, whole: bool = False) -> list[Markup]:
    parts = []
    for tick in x.ticks(4):
        if whole and not float(tick).is_integer():
            continue
        if bottom > top:
            parts.append(
                Markup('<line class="grid" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(x(tick), top, bottom)
            )
        anchor = "end" if x(tick) > WIDTH - _RIGHT - 14 else "middle"
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>').format(
                x(tick) + (4 if anchor == "end" else 0), bottom + 15, anchor, _told(tick)
            )
        )
    return parts


def _label_x(text: str, left: float, height: float) -> Markup:
    return Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        (left + WIDTH - _RIGHT) / 2, height - 6, text
    )


def _told(tick: float) -> str:
    if tick and not 1e-4 <= abs(tick) < 1e5:
        return f"{tick:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{tick:,.6g}"


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _svg(width: float, height: float, title: str, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">').format(width, height, escape(title))
    return head + Markup("").join(parts) + Markup("</svg>")
