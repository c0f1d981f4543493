"""Whether a run that is there may be taken up by this config: what `train --resume` would find, but for the student's weights.

In: the config, the rows, the sessions; out: findings. Nothing in the run folder changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

from student_trainer.config.run import TrainConfig
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.errors import StudentError
from student_trainer.findings import Finding
from student_trainer.model.load import Student
from student_trainer.teachers.session import TeacherSession
from student_trainer.training.identity import learned_from, other_teachers, with_teachers_of
from student_trainer.training.run_folder import IDENTITY_NAME, check_identity, identity_of, read_identity


def check_resumption(
    config: TrainConfig,
    data: TokenizedDataset,
    held_out: TokenizedDataset | None,
    sessions: Sequence[TeacherSession],
    *,
    allow_other_teachers: bool,
) -> Iterator[Finding]:
    """Compares with the run's identity; the student's weights are taken to be those that it was started with."""
    file = config.run.output_dir / IDENTITY_NAME
    if not file.is_file() or len(sessions) < len(config.every_teacher):
        return
    try:
        before = read_identity(file)
    except StudentError:
        return  # told by the check of the folder
    unread = cast(Student, SimpleNamespace(sha256=before.get("student", ""), computed_by=before.get("computed", "")))
    now: dict[str, Any] = identity_of(
        config, learned_from(config, unread, data, held_out, sessions, lambda session: session.info.fingerprint)
    )
    others = other_teachers(before, now)
    if others and allow_other_teachers:
        told = f"the run goes on with other teachers: {'; '.join(others)}"
        yield Finding.good("teachers", told, f"{told}; it is recorded in run.json")
        before = with_teachers_of(before, now)
    bad = list(check_identity(before, now, config))
    yield from bad
    if not bad:
        yield Finding.good(
            "run.output_dir",
            "settings, rows and teachers are those of the run that is there; its weights were not read",
        )
