"""The trainer's checkpoints, its last model, and what is said of a run that cannot go on; the loop is in `trainer.py`.

In: a trainer between two steps; out: folders that are whole, durable, and hold only numbers, or a line that says why not.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import Trainer

from student_trainer.config.run import TrainConfig
from student_trainer.errors import NonFiniteError, RunError
from student_trainer.files import disk_trouble_named, move_into, sync, sync_tree
from student_trainer.model.load import Student
from student_trainer.model.saving import not_finite, save_student, try_saving
from student_trainer.training.checkpoints import checkpoint, links
from student_trainer.training.deferred_checks import DeferredChecks
from student_trainer.training.learner import Learner


class KeepingTrainer(Trainer):
    """transformers' Trainer with our checkpoints; see module. The attributes are set by `DistillationTrainer`."""

    _config: TrainConfig
    _student: Student
    _learner: Learner
    _verdicts: DeferredChecks
    _on_trouble: Callable[[str], None]
    _writing: Path | None = None  # where a checkpoint is being written
    _told: set[str]
    keep_beside: Callable[[Path], None] | None = (
        None  # writes into the folder of a checkpoint what else the run needs to go on
    )

    def try_saving(self) -> None:
        """Saves once before the first step, and takes it away again.

        Raises:
            ModelError, RunError: the model cannot be saved, or the disk does not take it.
        """
        run_folder = Path(self.args.output_dir)
        try:
            with disk_trouble_named(str(run_folder)):
                trial = checkpoint.writing_folder(run_folder) / "trial"
                try_saving(self._student, trial)
        finally:
            checkpoint.discard_unfinished(run_folder)

    def save_final(self, folder: Path) -> None:
        """Writes the model to `folder`, whole and durable, or leaves what is there.

        Raises:
            NonFiniteError: its weights are not finite.
            RunError: the disk does not take it.
        """
        run_folder = Path(self.args.output_dir)
        with self._written(str(folder)):
            written = checkpoint.writing_folder(run_folder) / folder.name
            self._write(written, exported=True)
            sync_tree(written)
            if folder.exists():  # of an end that failed; or of somebody else, whose files stay
                move_into(written, folder)
            else:
                os.replace(written, folder)
            sync(run_folder)
            checkpoint.discard_unfinished(run_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._verdicts.settle()
        run_folder, step = Path(self.args.output_dir), self.state.global_step
        with self._written(f"{run_folder / f'checkpoint-{step}'}"):
            self._writing = checkpoint.writing_folder(run_folder)
            super()._save_checkpoint(model, trial)
            checkpoint.publish(self._writing / f"checkpoint-{step}", run_folder)
            self._writing = None
            best = self.point_links()
            checkpoint.rotate(run_folder, self._config.train.keep_checkpoints, step, best)

    def point_links(self) -> Path | None:
        """`best` and `last`; returns the best checkpoint."""
        history, metric = self.state.log_history, self._config.train.best_metric
        measured: dict[str, float] = next(
            (entry for entry in history if any(name.startswith("eval_") for name in entry)), {}
        )
        if measured and not any(f"eval_{metric}" in entry for entry in history):
            there = ", ".join(name.removeprefix("eval_") for name in measured if name.startswith("eval_"))
            self._tell_once(
                f"train.best_metric={metric} is not among the held-out figures ({there}): no link {links.BEST!r} is made"
            )
        return links.update(Path(self.args.output_dir), history, metric, self._tell_once)

    def _tell_once(self, told: str) -> None:
        if told not in self._told:
            self._told.add(told)
            self._on_trouble(told)

    def keep_last_step(self) -> Path | None:
        """A checkpoint of the last whole step, of a run that ends between two steps for a reason that is not its own; None before the first.

        Raises:
            RunError, NonFiniteError: as any checkpoint.
        """
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        newest = checkpoint.newest_whole(folder.parent)
        if step and newest != folder:
            # Steps since the last entry of the log would be in none: the run that goes on knows nothing of them.
            self.control.should_log, self.control.should_evaluate, self.control.should_save = True, False, False
            self._maybe_log_save_evaluate(self._tr_loss, None, self.model, None, 0, None, None)
            self._save_checkpoint(self.model, None)
        return folder if step else None

    @contextlib.contextmanager
    def _written(self, what: str) -> Iterator[None]:
        """Names trouble with the disk, and frees what a torn attempt has taken of it."""
        try:
            with disk_trouble_named(what, self._room_and_resume):
                yield
        except BaseException:
            self._writing = None
            with contextlib.suppress(OSError):
                checkpoint.discard_unfinished(Path(self.args.output_dir))
            raise

    def _room_and_resume(self) -> str:
        newest = checkpoint.newest_whole(Path(self.args.output_dir))
        return f"make room on the disk, then --resume{f' (from {newest.name})' if newest else ''}"

    def _get_output_dir(self, trial: Any) -> str:
        """Where transformers makes the folder of a checkpoint."""
        return str(self._writing) if self._writing else str(super()._get_output_dir(trial))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self._write(Path(output_dir or self.args.output_dir), state_dict)

    def _write(self, folder: Path, state_dict: Any = None, *, exported: bool = False) -> None:
        self._verdicts.settle()
        broken = self._broken()
        if broken:
            raise NonFiniteError(
                f"step {self.state.global_step}: its update has made the weights not finite, so they are not saved"
                f"{self._why_not_finite()}"
            )
        save_student(self._student, folder, state_dict, exported=exported)
        if not exported:
            self._learner.save_projectors(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoint.save_state(Path(output_dir), self.optimizer, self.lr_scheduler, self._verdicts.in_a_row)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, self._student.model)
        except (OSError, ValueError, RuntimeError) as error:
            raise RunError(f"{resume_from_checkpoint} cannot be read: {str(error)[:300]}") from error
        self._learner.load_projectors(Path(resume_from_checkpoint))
        if broken := self._broken():
            raise NonFiniteError(
                f"{resume_from_checkpoint}: its weights are not finite ({broken}); move it away to go on from the one before"
            )

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is not None:
            self._verdicts.in_a_row = checkpoint.load_state(Path(checkpoint_dir), self.optimizer, self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        checkpoint.save_random(Path(output_dir))
        if self.keep_beside is not None:
            self.keep_beside(Path(output_dir))

    def _load_rng_state(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is None:
            return
        if told := checkpoint.load_random(Path(checkpoint_dir)):
            self._on_trouble(told)
        with disk_trouble_named(str(self.args.output_dir), self._room_and_resume):
            self.point_links()  # a newer one may have turned out damaged

    def _broken(self) -> str:
        """The name of a trained weight that is not finite; empty if there is none."""
        parts = (self._student.model, self._learner.projectors)
        return next((name for part in parts if (name := not_finite(part, trained_only=True))), "")

    def _why_not_finite(self) -> str:
        """What is known of it, what is left, and what to try; for the end of a sentence."""
        settings, model = self._config.train, self._config.model
        broken = self._broken()
        newest = checkpoint.newest_whole(Path(self.args.output_dir))
        ways = [f"a lower train.learning_rate={settings.learning_rate:g}"]
        ways += ["train.max_grad_norm=1"] * (settings.max_grad_norm == 0)
        ways += ["train.nonfinite=skip, if it is those rows alone"] * (settings.nonfinite == "stop" and not broken)
        return (
            (
                f"; weights are not finite ({broken}): an earlier update left what {model.dtype} can hold"
                if broken
                else ""
            )
            + (f"; the newest checkpoint is {newest.name}" if newest else "; there is no checkpoint yet")
            + f"; try {', '.join(ways[:-1])}{' or ' if len(ways) > 1 else ''}{ways[-1]}"
        )
