"""What a run learns from, as digests by which it is taken up again or refused (`run_folder.open_folder`).

In: the config, the student, the rows and the sessions; out: the entries of run.json beside its settings. And two identities; out: what of
their teachers differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from student_trainer.config.run import TrainConfig
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.model.load import Student
from student_trainer.teachers.session import TeacherSession
from teacher_wire.core.info import LAYER_BASIS

TEACHERS_FIX = "go on with the old ones, or with --allow-other-teachers, which is told and recorded in run.json"
_OF_TEACHERS = ("teacher", "teachers", "bridges", "labels")  # entries of an identity that are about its teachers


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


def other_teachers(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of the teachers of a run has changed since it was started, in words."""
    settings = {name for name in before["settings"].keys() | now["settings"].keys() if is_of_teachers(name)}
    told = [
        f"{name}: {before['settings'].get(name)!r} -> {now['settings'].get(name)!r}"
        for name in sorted(settings)
        if before["settings"].get(name) != now["settings"].get(name)
    ]
    was, is_ = (fingerprints_of(identity) for identity in (before, now))
    for name in [*was, *(name for name in is_ if name not in was)]:
        if was.get(name) != is_.get(name):
            told.append(
                f"{name or 'teacher'}: fingerprint {was.get(name, 'none')[:16]}, now {is_.get(name, 'none')[:16]}"
            )
    if before.get("bridges") != now.get("bridges"):
        told.append("how tokens of another tokenizer are joined")
    return told


def fingerprints_of(identity: dict[str, Any]) -> dict[str, str]:
    """The fingerprints of an identity's teachers by name; of the only one by the empty name."""
    if "teachers" in identity:
        return {str(name): str(found) for name, found in json.loads(identity["teachers"]).items()}
    return {"": identity["teacher"]} if identity["teacher"] else {}


def is_of_teachers(setting: str) -> bool:
    """Whether it is one of a section of `teachers`."""
    return setting.startswith("teachers.")


def with_teachers_of(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """An earlier identity as it would be with the teachers of now."""
    settings = {name: value for name, value in before["settings"].items() if not is_of_teachers(name)}
    settings |= {name: value for name, value in now["settings"].items() if is_of_teachers(name)}
    kept = {name: value for name, value in before.items() if name not in _OF_TEACHERS}
    return kept | {name: now[name] for name in _OF_TEACHERS if name in now} | {"settings": settings}
