"""What is done for a run that does not come to its end: its last whole step is kept, and labels that are not the teacher's are not.

In: the error that ends it, its trainer, still open; out: the error that the user sees. Must never learn from anything more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from student_trainer.losses.integrity import TeacherHeadMismatch
from student_trainer.teachers.session import TeacherSession
from student_trainer.training.joined.teachers import JoinedTeachers, keep_last_step, who_is_away
from student_trainer.training.trainer import DistillationTrainer

log = logging.getLogger(__name__)


def leave_in_order(
    error: BaseException,
    trainer: DistillationTrainer,
    sessions: list[TeacherSession],
    joined: JoinedTeachers | None,
    note: Callable[[str], None],
) -> None:
    """Keeps the last whole step of a run that is interrupted or has lost one of its teachers; then as `_name_bad_labels`.

    Raises:
        TeacherAwayError: a teacher does not answer, and `error` says that in other words.
        StudentError: the step cannot be kept.
    """
    away = who_is_away(error) if joined else None
    try:  # before anything is closed: a checkpoint holds rollouts that may still be being written
        if isinstance(error, KeyboardInterrupt):
            trainer.stopping.keep(trainer, note)
        elif away is not None:
            keep_last_step(away, trainer)
    except BaseException as trouble:
        _name_bad_labels(trouble, trainer, sessions)
        raise
    _name_bad_labels(error, trainer, sessions)
    if away is not None and away is not error:
        raise away from error


def _name_bad_labels(error: BaseException, trainer: DistillationTrainer, sessions: list[TeacherSession]) -> None:
    """Deletes labels that are not the teacher's. What else ended the run may have come before the verdict on them was read.

    Raises:
        TeacherHeadMismatch: there were such, and `error` is another.
    """
    trainer.close()  # nothing more is kept
    mismatch = error if isinstance(error, TeacherHeadMismatch) else None
    try:
        trainer.settle()
    except TeacherHeadMismatch as found:
        mismatch = mismatch or found
    except Exception:  # the device itself is gone
        log.debug("no verdict", exc_info=True)
    if mismatch is None:
        return
    for session in sessions:
        if mismatch.teacher in ("", session.name) and (told := session.service.forget(session.info)):
            mismatch.add_note(told)
    if mismatch is not error:
        raise mismatch from error
