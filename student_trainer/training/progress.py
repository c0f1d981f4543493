"""What a person sees while a run goes on: one live line, and a line a log step. Draws only; decides nothing."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

_SHOWN = {
    "loss": "loss {:.4f}",
    "kd_loss": "kd {:.4f}",
    "sft_loss": "sft {:.4f}",
    "acc1": "acc1 {:.3f}",
    "learning_rate": "lr {:.2g}",
    "tokens_per_s": "{:,.0f} tok/s",
    "wait_share": "waiting for the teacher {:.0%}",
    "cache_hits": "labels from disk {:.0%}",
    "skipped_steps": "{:d} steps left out",
    "eval_nll_per_byte": "held-out {:.4f} nats/byte",
    "eval_kl_to_teacher": "KL to teacher {:.4f}",
    "eval_acc1": "acc1 {:.3f}",
    "eval_acc3": "acc3 {:.3f}",
}


def describe_logs(logs: dict[str, float]) -> str:
    """The known figures of a log entry as one line."""
    return "  ".join(text.format(logs[name]) for name, text in _SHOWN.items() if name in logs)


class ConsoleProgress(TrainerCallback):
    """A bar over optimizer steps, with the newest figures beside it."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._progress: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task(
            self._title, total=state.max_steps, completed=state.global_step, figures=""
        )
        self._progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        figures = describe_logs(logs or {})
        if self._progress is None or not figures:
            return
        self._progress.update(self._task, figures=figures)
        if "eval_nll_per_byte" in (logs or {}) or not self._console.is_terminal:
            self._progress.console.print(f"[dim]{self._title} step {state.global_step}:[/] {figures}", highlight=False)

    def close(self) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
