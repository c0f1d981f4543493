"""What a run learns from, as digests by which it is taken up again or refused (`run_folder.open_folder`).

In: the config, the student, the rows and the sessions; out: the entries of run.json beside its settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from student_trainer.config.run import TrainConfig
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.model.load import Student
from student_trainer.teachers.session import TeacherSession
from teacher_wire.core.info import LAYER_BASIS


def learned_from(
    config: TrainConfig,
    student: Student,
    data: TokenizedDataset,
    held_out: TokenizedDataset | None,
    sessions: Sequence[TeacherSession],
    fingerprint: Callable[[TeacherSession], str],
) -> dict[str, str]:
    """The digests of a run.

    Args:
        fingerprint: of a session's teacher; of one that the run itself moves, that of the revision it was begun with.
    """
    labels = [session.labels for session in sessions] or [config.labels]
    found = {
        "teacher": "\n".join(map(fingerprint, sessions)),
        "data": data.sha256,
        "held_out": held_out.sha256 if held_out else "",
        "student": student.sha256,
        "labels": "\n".join(settings.model_dump_json() for settings in labels),
        "computed": student.computed_by,
        "date": data.rendering.day if data.rendering else "",
        "rendering": data.rendering.sha256 if data.rendering else "",
    }
    layers = [session for session in sessions if session.features is not None and session.features.needs_basis]
    if layers and config.loss.output is not None:
        found["basis"] = "\n".join(session.info.artifact(LAYER_BASIS).sha256 for session in layers)
    if len(config.teachers) > 1:
        found["teachers"] = json.dumps({session.name: fingerprint(session) for session in sessions})
    if bridged := {session.name: _bridge(config, session) for session in sessions if session.bridge is not None}:
        found["bridges"] = json.dumps(bridged, sort_keys=True)
    return found


def _bridge(config: TrainConfig, session: TeacherSession) -> list[str]:
    """What decides how a teacher's tokens are joined to the student's."""
    assert session.bridge is not None
    settings = next(
        teacher.cross_tokenizer
        for teacher in config.every_teacher
        if teacher.called == session.name or len(config.every_teacher) == 1
    )
    return [session.bridge.digest, settings.model_dump_json()]
