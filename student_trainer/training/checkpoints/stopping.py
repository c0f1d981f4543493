"""When a run may be broken off without loss: between two steps, with a checkpoint of the last one.

In: an interruption (Ctrl-C, SIGTERM); out: whether the step goes on to its end first, and a checkpoint that `--resume` goes on from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerCallback

from student_trainer.training.checkpoints.checkpoint_rotation import KeepingTrainer


class Stopping(TrainerCallback):
    """The last of a trainer's callbacks. The first word lets a step end that is being computed, the second waits for nothing.

    Between two steps, also while labels or rollouts are waited for and held-out rows measured, the first word too ends the run where it is.

    Args:
        measure: measures the held-out rows and logs the figures; called at the start of a run that was broken off where that was due.
    """

    def __init__(self, measure: Callable[[], object]) -> None:
        self.words = 0
        self._in_step = False
        self._measure = measure

    def asked(self) -> bool:
        """An interruption; whether the run ends by itself after the step it is in."""
        self.words += 1
        return self._in_step and self.words == 1

    def step_begins(self) -> None:
        """What follows belongs to a step: until its end there is nothing that a checkpoint could hold."""
        self._in_step = True

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A part of a step that has changed nothing yet, and may be long: who was asked before does not begin it."""
        self._in_step = False
        if self.words:
            raise KeyboardInterrupt
        yield
        self._in_step = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes up for figures that the checkpoint's step should have and has not."""
        step = state.global_step
        if not step or args.eval_strategy == "no" or step % args.eval_steps:
            return
        at_step = [entry for entry in state.log_history if entry.get("step") == step]
        if not any(name.startswith("eval_") for entry in at_step for name in entry):
            self._measure()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The entry of the log, a checkpoint and the end, if that was asked for; what is due to be measured waits for the run that goes on."""
        self._in_step = False
        if self.words:
            control.should_log = control.should_save = True
            control.should_evaluate = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The end that was asked for; as an error, since transformers logs a summary of what ends well."""
        if self.words:
            raise KeyboardInterrupt

    def keep(self, trainer: KeepingTrainer, note: Callable[[str], None]) -> None:
        """Writes the checkpoint of an interrupted run, if that is possible and nobody asked twice.

        Raises:
            RunError, NonFiniteError: as any checkpoint.
        """
        if self._in_step or self.words > 1:
            return
        if kept := trainer.keep_last_step():
            note(f"{kept.name} is kept")
