"""The on-policy part of a run: made before its folder exists, told of every step, kept in its checkpoints.

In: config, student, rows, teacher; out: a `WindowSource` in place of the data's own, a term for the log, a callback for the trainer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from student_trainer.config.run import TrainConfig
from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.losses.term import LossTerm
from student_trainer.model.load import Student
from student_trainer.rollout.engines.registry import build_sampler
from student_trainer.rollout.figures import RolloutFigures
from student_trainer.rollout.health import HealthTerm
from student_trainer.rollout.ledger import Ledger
from student_trainer.rollout.pending import load_pending, save_pending
from student_trainer.rollout.plan import RolloutPlan
from student_trainer.rollout.prompts import Prompts, stop_ids
from student_trainer.rollout.writer import RolloutWriter
from student_trainer.teachers.session import TeacherSession
from student_trainer.training.checkpoints import checkpoint
from student_trainer.training.on_policy.checks import room_of
from student_trainer.training.on_policy.windows import RolloutWindows


class Rollouts(TrainerCallback):
    """See module; a callback of the trainer, before those that show the log.

    Args:
        config: of a run with `on_policy`.
        student: who writes; the writer has a copy of what is trained of it.
        data, order: the rows, and which of them each step holds.
        plan: of the rollouts.
        teachers: whose labels they get.
        vocab_rows: V, ids that student and teacher share.
        note: told what a user should know, a sentence at a time.

    Raises:
        ConfigError, RolloutError: the engine is not there, or the student cannot write by it.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: Student,
        data: TokenizedDataset,
        order: RunOrder,
        plan: RolloutPlan,
        teachers: Sequence[TeacherSession],
        vocab_rows: int,
        note: Callable[[str], None],
    ) -> None:
        settings = config.on_policy
        assert settings is not None
        self._student = student
        self._keeps = settings.max_staleness > 0
        self._figures = RolloutFigures(note)
        self._ledger = Ledger(config.run.output_dir)
        self._prompts = Prompts(data, order, plan, room_of(settings, student.outline.positions, teachers))
        sampler = build_sampler(
            config,
            settings,
            student,
            vocab_rows=vocab_rows,
            stop_ids=stop_ids(student.tokenizer, student.causal_lm, data),
        )
        self._writer = RolloutWriter(plan, self._prompts, sampler)
        self.windows = RolloutWindows(
            order,
            plan,
            self._prompts,
            self._writer,
            self._ledger,
            self._figures,
            stops=settings.on_failure == "stop",
            note=note,
        )
        self.term: LossTerm = HealthTerm(partial(student.head, vocab_rows))
        self._logged_s = time.perf_counter()

    def begin(self, start: Path | None) -> None:
        """The run starts at a checkpoint, or at step 0.

        Raises:
            RunError: what the checkpoint holds of rollouts cannot be read.
        """
        self._ledger.cut(checkpoint.step_of(start) if start else 0)
        if start is not None and self._keeps:
            self._writer.restore(load_pending(start, self._prompts.of))

    def save(self, folder: Path) -> None:
        """Writes into a checkpoint what the weights in it cannot write again."""
        if self._keeps:
            save_pending(folder, self._writer.pending())

    def close(self) -> None:
        """Ends the engine; may come twice."""
        self._writer.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._weights_are(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._weights_are(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Adds the figures to an entry about the loss, before others see it."""
        if logs is None or "loss" not in logs:
            return
        before, now_s = set(logs), time.perf_counter()
        self._figures.into(logs)
        logs["rollout_wait_share"] = self.windows.waited_s / max(now_s - self._logged_s, 1e-9)
        self.windows.waited_s, self._logged_s = 0.0, now_s
        entry = state.log_history[-1]
        for name in before - set(logs):
            entry.pop(name, None)
        entry.update(logs)

    def _weights_are(self, version: int) -> None:
        self.windows.forget(version)
        self._writer.weights_are(version, self._trained())

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._student.model.named_parameters() if p.requires_grad}
