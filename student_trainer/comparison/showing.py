"""What a person sees of a comparison: a bar over all runs with the time that is left, and a line per run. Draws only; decides nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from student_trainer.evaluation.outcome import RunOutcome

_SHOWN = ("nll_per_byte", "nll_per_token", "kl_to_teacher", "acc1", "acc3")


class _TimeLeft(ProgressColumn):
    """The time until `ends_s`, which the work sets: runs are too long for rich's own window of 30 seconds."""

    def render(self, task: Task) -> Text:
        ends_s = task.fields["ends_s"]
        return Text("" if ends_s is None else f"{told_time(max(0.0, ends_s - time.monotonic()))} left", style="cyan")


class Showing:
    """A bar in runs, each filled by its steps.

    Args:
        console: where it is drawn; where there is no terminal a line per run says the same.
        runs: (arm, seed) of every run that is not done yet, in order.
        done: runs that were done before.
        seconds: of runs that were made before, by arm.
    """

    def __init__(
        self, console: Console, runs: Sequence[tuple[str, int]], done: int, seconds: dict[str, list[float]]
    ) -> None:
        self._console, self._left = console, list(runs)
        self._all, self._done, self._seconds = len(runs) + done, float(done), seconds
        self._began_s, self._begun_at, self._title, self._share = 0.0, 0.0, "", 0.0
        self._progress = Progress(
            TextColumn("[bold]compare"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[runs]}"),
            _TimeLeft(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=self._all, completed=done, runs=self._told_runs(), ends_s=None)
        self._progress.start()

    def begin(self, arm: str, seed: int) -> None:
        """A run begins."""
        self._began_s, self._title, self._share, self._begun_at = time.monotonic(), f"{arm} seed {seed}", 0.0, -1.0
        self._console.print(
            f"[bold]{escape(arm)}[/] seed {seed}  [dim]({self._told_runs()} are done{self._told_left()})[/]"
        )
        self._refresh()

    def step(self, step: int, steps: int) -> None:
        """The run has made `step` of `steps` steps."""
        share = step / max(1, steps)
        if self._begun_at < 0:  # of a run that goes on, what was made before took no time now
            self._begun_at = max(0.0, (step - 1) / max(1, steps))
        self._share = min(1.0, share)
        self._refresh()

    def end(self, outcome: RunOutcome) -> None:
        """The run has ended: a line with its figures, or why it failed."""
        arm = outcome.name
        took_s = time.monotonic() - self._began_s
        if self._left:
            self._left.pop(0)
        self._done, self._share = self._done + 1, 0.0
        if outcome.state == "done":
            self._seconds.setdefault(arm, []).append(took_s)
            figures = "  ".join(f"{n} {v:.4f}" for n in _SHOWN if (v := outcome.metrics.get(n)) is not None)
            self._console.print(f"  {outcome.steps:,} steps in {told_time(took_s)}  {figures}", markup=False)
        else:
            self._console.print(f"  [bold red]failed:[/] {escape(outcome.error)}")
        self._refresh()

    def close(self) -> None:
        """Takes the bar away."""
        self._progress.stop()

    def _refresh(self) -> None:
        left_s = self._left_s()
        self._progress.update(
            self._task,
            completed=self._done + self._share,
            description=self._title,
            runs=self._told_runs(),
            ends_s=None if left_s is None else time.monotonic() + left_s,
        )

    def _left_s(self) -> float | None:
        """Seconds until all runs have ended, by the runs of the same arm, else of all; None before anything is known."""
        known = {arm: fmean(values) for arm, values in self._seconds.items() if values}
        current: float | None = None
        made = self._share - max(0.0, self._begun_at)
        if self._left and made > 0:
            spent_s = time.monotonic() - self._began_s
            current = spent_s / made * (1 - self._share)
            known.setdefault(self._left[0][0], spent_s / made)
        if not known:
            return None
        mean = fmean(known.values())
        rest = self._left if current is None else self._left[1:]
        return (current or 0.0) + sum(known.get(arm, mean) for arm, _ in rest)

    def _told_runs(self) -> str:
        return f"{int(self._done)}/{self._all} runs"

    def _told_left(self) -> str:
        left_s = self._left_s()
        return "" if left_s is None else f", about {told_time(left_s)} left"


def told_time(seconds: float) -> str:
    """A span as people say it: `45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
