"""When a run may be broken off without loss: between two steps, with a checkpoint of the last one.

In: an interruption (Ctrl-C, SIGTERM); out: whether the step goes on to its end first, and a checkpoint that `--resume` goes on from.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from student_trainer.interruption import guarded
from student_trainer.training.checkpoints.checkpoint_rotation import KeepingTrainer
from student_trainer.training.run_folder import LOG_NAME


class Stopping(TrainerCallback):
    """The last of a trainer's callbacks. The first signal lets the step finish that is being computed, logged or saved; the second stops at once.

    While labels or rollouts are waited for and held-out rows measured, the first signal stops the run right away.

    Args:
        measure: measures the held-out rows and logs the figures; called at the start of a run that was broken off where that was due.
    """

    def __init__(self, measure: Callable[[], object]) -> None:
        self.signals = 0
        self._in_step = False
        self._measure = measure

    def asked(self) -> bool:
        """An interruption; whether the run ends by itself after the step it is in."""
        self.signals += 1
        return self._in_step and self.signals == 1

    @contextlib.contextmanager
    def waiting(self, *, then_in_step: bool = True) -> Iterator[None]:
        """What may be long and changes nothing that a checkpoint holds: who was asked before does not begin it. What follows belongs to a
        step, unless it is said otherwise: until the next wait there is nothing to be kept, or something is being written.
        """
        self._in_step = False
        if self.signals:
            raise KeyboardInterrupt
        with guarded():
            yield
        self._in_step = then_in_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes up for figures that the checkpoint's step should have and has not."""
        step = state.global_step
        if not step or args.eval_strategy == "no" or step % args.eval_steps:
            return
        if any(_is_measured(entry, step) for entry in state.log_history):
            return
        made_up = [entry for entry in _entries(Path(args.output_dir) / LOG_NAME) if _is_measured(entry, step)]
        if made_up:  # by an earlier resumption from the same checkpoint
            state.log_history.append(made_up[0])
        else:
            self._measure()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The entry of the log, a checkpoint and the end, if that was asked for; what is due to be measured waits for the run that goes on."""
        if self.signals:
            control.should_log = control.should_save = True
            control.should_evaluate = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The end that was asked for; as an error, since transformers logs a summary of what ends well."""
        if self.signals:
            self._in_step = False
            raise KeyboardInterrupt

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_step = False

    def keep(self, trainer: KeepingTrainer, note: Callable[[str], None]) -> None:
        """Writes the checkpoint of an interrupted run, if that is possible and nobody asked twice.

        Raises:
            RunError, NonFiniteError: as any checkpoint.
        """
        if self._in_step or self.signals > 1:
            return
        if kept := trainer.keep_last_step():
            note(f"{kept.name} is kept")


def _is_measured(entry: dict[str, Any], step: int) -> bool:
    """Whether an entry of the log holds the held-out figures of a step."""
    return entry.get("step") == step and any(name.startswith("eval_") for name in entry)


def _entries(path: Path) -> list[dict[str, Any]]:
    """Those of a log that can be read; others are told of where it is cut."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            found += [entry] if isinstance(entry, dict) else []
    return found
