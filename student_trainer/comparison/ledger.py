"""What a run of a comparison took and how it ended, beside its folder, so that it outlives the process.

In: what the trainer's callback counts and what ended the run; out: a JSON file per run, replaced whole, and its `Cost`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from student_trainer.evaluation.outcome import Cost
from student_trainer.files import read_object, write_whole
from student_trainer.training.run_folder import RunResult


class Ledger:
    """The attempts at one run, each with its seconds, and the error of the last.

    Args:
        folder: of the run; the file lies beside it.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder.with_name(f"{folder.name}.json")
        self.attempts: list[dict[str, Any]] = []
        self.error = ""
        try:
            found = read_object(self._file)
            self.attempts, self.error = list(found["attempts"]), str(found["error"])
        except (OSError, ValueError, KeyError, TypeError):  # the first attempt, or figures of cost that are lost
            pass
        self._began_s = 0.0

    def begin(self, gpus: int) -> None:
        """An attempt begins."""
        self.error, self._began_s = "", time.monotonic()
        self.attempts.append({"gpus": gpus, "wall_s": 0.0, "train_s": 0.0, "step": 0, "ended": False})
        self.write()

    def progress(self, step: int, train_s: float) -> None:
        """A checkpoint of the attempt is on disk: a later attempt goes on from `step` after `train_s` seconds of steps."""
        self.attempts[-1] |= {"step": step, "train_s": train_s, "wall_s": time.monotonic() - self._began_s}
        self.write()

    def end(self, result: RunResult, train_s: float) -> None:
        """The attempt came to the end of the run after `train_s` seconds of steps."""
        usage = result.usage
        self.attempts[-1] |= {
            "wall_s": time.monotonic() - self._began_s,
            "ended": True,
            "step": result.steps,
            "train_s": train_s,
            "teacher_tokens": usage.teacher_tokens if usage else 0,
            "disk_tokens": usage.disk_tokens if usage else 0,
            "label_bytes": result.label_bytes if usage else 0,
        }
        self.write()

    def fail(self, error: str) -> None:
        """The attempt has ended with an error, or was interrupted (then `error` is empty); its last checkpoint counts."""
        self.attempts[-1] |= {"wall_s": time.monotonic() - self._began_s, "ended": True}
        self.error = error
        self.write()

    def write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._file, json.dumps({"attempts": self.attempts, "error": self.error}, indent=1) + "\n")

    def cost(self) -> Cost:
        """Of all attempts; labels are counted by those that came to the end."""
        if not self.attempts:
            return Cost()
        counted = [attempt for attempt in self.attempts if attempt.get("teacher_tokens") is not None]
        return Cost(
            train_s=sum(attempt["train_s"] for attempt in self.attempts),
            wall_s=sum(attempt["wall_s"] for attempt in self.attempts),
            at_least=len(counted) < len(self.attempts),
            gpu_hours=sum(attempt["wall_s"] * attempt["gpus"] for attempt in self.attempts) / 3600,
            teacher_tokens=sum(attempt["teacher_tokens"] for attempt in counted) if counted else None,
            disk_tokens=sum(attempt["disk_tokens"] for attempt in counted) if counted else None,
            label_bytes=counted[-1].get("label_bytes") if counted else None,
        )


class Watch(TrainerCallback):
    """Counts the seconds of optimizer steps, waiting for labels included and measuring and saving left out.

    Args:
        on_step: called with the number of steps made, after each.
        on_save: called with step and seconds, after each checkpoint.

    Attributes:
        train_s: seconds of steps in this process; the first one's start-up is in it.
        ended_s: `train_s` at the end of each step.
        step: steps made, those before a resumption included.
    """

    def __init__(self, on_step: Callable[[int], None], on_save: Callable[[int, float], None]) -> None:
        self._on_step, self._on_save = on_step, on_save
        self.train_s, self.step = 0.0, 0
        self.ended_s: list[float] = []
        self._mark_s = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark_s, self.step = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now_s = time.monotonic()
        self.train_s += now_s - self._mark_s
        self._mark_s, self.step = now_s, state.global_step
        self.ended_s.append(self.train_s)
        self._on_step(self.step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark_s = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._on_save(state.global_step, self.train_s)
        self._mark_s = time.monotonic()
