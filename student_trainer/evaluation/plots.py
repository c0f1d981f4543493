"""Plots of a comparison of arms: training loss and held-out curves.

In: `Results` and `CurvePoint`s. Out: PNG files, each replaced whole; an image without points is not written.
Must never smooth, nor share an axis between losses that measure different things.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from student_trainer.evaluation.report import CurvePoint, Results, shown_as
from teacher_wire.labels.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008): distinguishable with every kind of colour vision. The base arm is the first.
COLOURS = ("#5A5A5A", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
HELDOUT = ("nll_per_byte", "kl_to_teacher")
LINE_STYLES = ("-", "--", "-.", ":")


def write_plots(folder: Path, results: Results, curves: Sequence[CurvePoint]) -> list[str]:
    """Write loss.png and heldout.png into `folder`.

    Returns:
        The names of the files written.
    """
    drawn = {"loss.png": draw_loss(results, curves), "heldout.png": draw_heldout(results, curves)}
    written = {name: figure for name, figure in drawn.items() if figure is not None}
    for name, figure in written.items():
        with replacing(folder / name) as partial:
            figure.savefig(partial, format="png", dpi=150)
    return list(written)


def draw_loss(results: Results, curves: Sequence[CurvePoint]) -> Figure | None:
    """One panel an arm, since the arms' losses (cross entropy, divergence) are different quantities."""
    arms = [arm for arm in results.arms if any(p.arm == arm and p.metric == "loss" for p in curves)]
    if not arms:
        return None
    figure, panels = _panels(len(arms), width=4.0)
    for arm, axes in zip(arms, panels, strict=True):
        _band(axes, [p for p in curves if p.arm == arm and p.metric == "loss"], _style(results, arm), label="")
        axes.set_title(arm, loc="left")
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("training loss (nats/token)")
    figure.suptitle(_subtitle("Training loss", results), x=0.01, ha="left")
    return figure


def draw_heldout(results: Results, curves: Sequence[CurvePoint]) -> Figure | None:
    """Held-out curves of all arms, a panel a metric, the teacher's own value as a dotted line."""
    metrics = [m for m in HELDOUT if any(p.metric == m for p in curves)]
    if not metrics:
        return None
    figure, panels = _panels(len(metrics), width=5.2)
    for name, axes in zip(metrics, panels, strict=True):
        for arm in results.arms:
            points = [p for p in curves if p.arm == arm and p.metric == name]
            if points:
                _band(axes, points, _style(results, arm), label=arm)
        if name == "nll_per_byte" and name in results.teacher:
            axes.axhline(results.teacher[name], color="black", linewidth=1, linestyle=":", label="teacher")
        axes.set_title(f"{shown_as(name).label} ({shown_as(name).unit})", loc="left")
        axes.margins(x=0.02)
        if name == "kl_to_teacher":
            axes.set_ylim(bottom=0)
    panels[0].legend(frameon=False)
    figure.suptitle(_subtitle("Held-out curves", results), x=0.01, ha="left")
    return figure


def _panels(count: int, width: float) -> tuple[Figure, list[Axes]]:
    # Figure without pyplot: no global state, no display, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(1, count, i + 1) for i in range(count)]
    for axes in panels:
        axes.set_xlabel("optimizer step")
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _band(axes: Axes, points: Sequence[CurvePoint], style: tuple[str, str], label: str) -> None:
    """The mean over seeds as a line, the range from the lowest to the highest seed as a band."""
    values: dict[int, list[float]] = defaultdict(list)
    for point in points:
        values[point.step].append(point.value)
    steps = sorted(values)
    colour, line = style
    low, high = ([pick(values[s]) for s in steps] for pick in (min, max))
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(steps, [fmean(values[s]) for s in steps], color=colour, linestyle=line, linewidth=1.6, label=label)


def _style(results: Results, arm: str) -> tuple[str, str]:
    place = [results.base, *(a for a in results.arms if a != results.base)].index(arm)
    # Arms that teach the same thing by other transports lie on one another: dashes let both be seen.
    return COLOURS[place % len(COLOURS)], LINE_STYLES[max(0, place - 1) % len(LINE_STYLES)]


def _subtitle(title: str, results: Results) -> str:
    count = len(results.seeds)
    return f"{title}: mean of {count} seeds, band from lowest to highest" if count > 1 else f"{title}: one seed"
