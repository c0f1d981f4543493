"""What a person sees while a run goes on: a line per log step, which stays, and on a terminal a bar below them. Draws only; decides nothing.

In: the trainer's events; out: text. What a line says is in words of this house: where the time goes, where labels come from, how old the
student's own samples are.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback

from student_trainer.progress import ProgressBar

_SHOWN = {
    "loss": "loss {:.4f}",
    "kd_loss": "kd {:.4f}",
    "sft_loss": "sft {:.4f}",
    "hidden_loss": "hidden {:.4f}",
    "attention_loss": "attention {:.4f}",
    "ffn_loss": "ffn {:.4f}",
    "acc1": "acc1 {:.3f}",
    "learning_rate": "lr {:.2g}",
    "tokens_per_s": "{:,.0f} tok/s",
    "wait_share": "waiting for the teacher {:.0%}",
    "cache_hits": "labels from disk {:.0%}",
    "on_policy_share": "on-policy {:.0%}",
    "staleness": "{:.1f} steps old",
    "teacher_agreement": "teacher agrees {:.0%}",
    "rollout_failures": "{:d} prompts without a completion",
    "skipped_steps": "{:d} steps left out",
    "eval_nll_per_byte": "held-out {:.4f} nats/byte",
    "eval_kl_to_teacher": "KL to teacher {:.4f}",
    "eval_acc1": "acc1 {:.3f}",
    "eval_acc3": "acc3 {:.3f}",
}
# Beside the bar there is room for the few figures that say how the run is doing now; the lines above it hold them all.
_BESIDE = {
    "loss": "loss {:.4f}",
    "tokens_per_s": "{:,.0f} tok/s",
    "wait_share": "wait {:.0%}",
    "cache_hits": "store {:.0%}",
    "staleness": "{:.1f} steps old",
}

_ALONE = "wait_share."  # and the name of one of several teachers
_TOLD_SHARE = 0.02  # of the time waited for one teacher alone, from which on it is named
_LIMITS, _ENTRIES = (
    0.5,
    3,
)  # a share of the time, over so many log entries, from which on the teacher is what the run's speed hangs on


def describe_logs(logs: dict[str, float]) -> str:
    """The known figures of a log entry as one line; the one of several teachers that is waited for most is named."""
    shown = [text.format(logs[name]) for name, text in _SHOWN.items() if name in logs]
    alone = {name.removeprefix(_ALONE): share for name, share in logs.items() if name.startswith(_ALONE)}
    slowest = max(alone, key=lambda name: alone[name], default="")
    if slowest and alone[slowest] >= _TOLD_SHARE:
        shown.append(f"for {slowest} alone {alone[slowest]:.0%}")
    return "  ".join(shown)


class Pace:
    """How long the rest takes, from the newest steps: the first ones compile, connect and fill what others find full.

    Args:
        total: steps of the run.
        clock: seconds.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._clock = clock
        self._seen: deque[tuple[int, float]] = deque(maxlen=51)

    def step(self, done: int) -> None:
        """So many steps are done."""
        self._seen.append((done, self._clock()))

    @property
    def left_s(self) -> float | None:
        """Seconds to the end of the last step; None until two steps were seen."""
        if len(self._seen) < 2:
            return None
        (first, began_s), (done, now_s) = self._seen[0], self._seen[-1]
        return (self._total - done) * (now_s - began_s) / (done - first)


def span(seconds: float) -> str:
    """A span of time as a person says it, in the two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 24 else f"{hours // 24} d {hours % 24:02d} h"


class ConsoleProgress(TrainerCallback):
    """A line per log entry, and a bar over optimizer steps with the newest figures beside it."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._bar: ProgressBar | None = None
        self._pace = Pace(0)
        self._waits: deque[float] = deque(maxlen=_ENTRIES)
        self._explained = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = ProgressBar(self._console, self._title, state.max_steps, done=state.global_step)
        self._bar.update(figures="the first step is under way")
        self._pace = Pace(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pace.step(state.global_step)
        if self._bar is not None:
            self._bar.update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        figures = describe_logs(logs)
        if self._bar is None or not figures:
            return
        if beside := "  ".join(text.format(logs[name]) for name, text in _BESIDE.items() if name in logs):
            self._bar.update(figures=beside)
        left_s = self._pace.left_s
        # A terminal's bar says how long it takes; elsewhere the line does.
        ahead = f"  {span(left_s)} left" if left_s and not self._console.is_terminal and "loss" in logs else ""
        place = f"{self._title} step {state.global_step}/{state.max_steps}:"
        self._console.print(f"[dim]{escape(place)}[/] {figures}{ahead}", highlight=False)
        self._explain(logs)

    def _explain(self, logs: dict[str, float]) -> None:
        """Says once what the speed of the run hangs on, where that is not the student."""
        if "wait_share" not in logs:
            return
        self._waits.append(logs["wait_share"])
        if self._explained or len(self._waits) < _ENTRIES or min(self._waits) < _LIMITS:
            return
        self._explained = True
        self._console.print(
            f"[yellow]note:[/] {sum(self._waits) / _ENTRIES:.0%} of the time the student waits for labels: the teacher limits this run. More of "
            "its replicas (teacher-server), or labels made ahead by student-trainer label, would make it faster; results stay the same",
            highlight=False,
        )

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
