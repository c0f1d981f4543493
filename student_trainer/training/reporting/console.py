"""What a person sees while a run goes on: one live line, and a line per log step. Draws only; decides nothing."""

from __future__ import annotations

from typing import Any

from rich.console import Console
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


_ALONE = "wait_share."  # and the name of one of several teachers
_TOLD_SHARE = 0.02  # of the time waited for one teacher alone, from which on it is named


def describe_logs(logs: dict[str, float]) -> str:
    """The known figures of a log entry as one line; the one of several teachers that is waited for most is named."""
    shown = [text.format(logs[name]) for name, text in _SHOWN.items() if name in logs]
    alone = {name.removeprefix(_ALONE): share for name, share in logs.items() if name.startswith(_ALONE)}
    slowest = max(alone, key=lambda name: alone[name], default="")
    if slowest and alone[slowest] >= _TOLD_SHARE:
        shown.append(f"for {slowest} alone {alone[slowest]:.0%}")
    return "  ".join(shown)


class ConsoleProgress(TrainerCallback):
    """A bar over optimizer steps, with the newest figures beside it."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._bar: ProgressBar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = ProgressBar(self._console, self._title, state.max_steps, done=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        figures = describe_logs(logs or {})
        if self._bar is None or not figures:
            return
        self._bar.update(figures=figures)
        if "eval_nll_per_byte" in (logs or {}) or not self._console.is_terminal:
            self._console.print(f"[dim]{self._title} step {state.global_step}:[/] {figures}", highlight=False)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
