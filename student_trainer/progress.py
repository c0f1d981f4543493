"""The one progress bar of this house: a title, a bar, how far it is, the time left, and figures beside it; and what has no total.

In: a total and how much of it is done; out: one live line on a terminal, which goes when the work ends, and nothing elsewhere.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """A bar on a console, from its making to `close` or the end of its block.

    Args:
        console: where it is drawn.
        title: in front of it.
        total: units of the whole work; None until `update` says it.
        done: units that were done before.
        in_units: show `done/total`; without it the share in per cent.
    """

    def __init__(
        self, console: Console, title: str, total: int | None = None, *, done: int = 0, in_units: bool = True
    ) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn() if in_units else TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,  # else it ends with an empty line
        )
        self._task = self._progress.add_task(title, total=total, completed=done, figures="")
        self._progress.start()

    def update(self, done: int | None = None, *, total: int | None = None, figures: str | None = None) -> None:
        """Shows what has changed."""
        if figures is not None:
            self._progress.update(self._task, figures=figures)
        self._progress.update(self._task, completed=done, total=total)

    def close(self) -> None:
        """Takes the bar away."""
        self._progress.stop()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def working(console: Console, what: str) -> AbstractContextManager[object]:
    """Shows that something is under way that may take minutes: a live line on a terminal, a line that stays elsewhere."""
    if console.is_terminal:
        return console.status(escape(what))
    console.print(f"{what} ...", markup=False)
    return nullcontext()
