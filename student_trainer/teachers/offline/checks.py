"""What a run cannot do with a teacher that is not asked, by the name of the setting and with the way out."""

from __future__ import annotations

from collections.abc import Iterator

from student_trainer.config.teachers import LabelConfig, TeacherConfig
from student_trainer.findings import Finding
from teacher_wire.core.info import TeacherInfo


def check_offline_labels(settings: TeacherConfig, info: TeacherInfo, labels: LabelConfig) -> Iterator[Finding]:
    """Whether an offline teacher need not be asked before it is known which labels to look for; nothing of one that is asked."""
    if not settings.offline:
        return
    if labels.transport == "auto":
        what = f"labels.transport=auto: what teacher {info.name!r} and its link allow is measured, and it is offline (teacher.offline=true)"
        yield Finding.bad("labels.transport", what, "name the transport that its labels were filled in with")
    else:
        yield Finding.good("teacher.offline", f"teacher {info.name!r} is answered for from disk")
