"""The answers of several teachers about a micro-batch as the loss reads them: whose rows are which, and how much each counts.

In: a padded micro-batch with its joined answer; out: `JoinedLabels`. What is known on the host stays there.

Axes: B sequences of the micro-batch, N supervised rows of the student, M of one teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from student_trainer.labels.joined.answer import Answer, JoinedAnswer, shares
from student_trainer.labels.rows_on_device import CHECKED_ROWS, rows_on
from student_trainer.labels.source import LabelRequest
from student_trainer.losses.cross_tokenizer.bridge import Bridge, Groups
from student_trainer.losses.head import Head
from student_trainer.losses.term import JoinedLabels, TeacherLabels, TeacherShare
from student_trainer.training.windows import PaddedBatch


@dataclass(frozen=True)
class JoinedTeacher:
    """One of several teachers, as the learner knows it.

    Attributes:
        name: in the run.
        weight: its share beside the others.
        head: its output head on the student's device, for `hidden` labels.
        bridge: groups of rows, and int64 [M] the teacher's tokens -> how they are joined to the student's; None for its tokenizer.
    """

    name: str
    weight: float
    head: Head | None = None
    bridge: Callable[[Groups, np.ndarray], Bridge] | None = None


class Joiner:
    """See module.

    Args:
        teachers: of the run, in the order of the config.
        is_alone: there is one teacher, which is asked about every row: its labels are those of a run with one.
    """

    def __init__(self, teachers: Sequence[JoinedTeacher], *, is_alone: bool = False) -> None:
        self._teachers = tuple(teachers)
        self._weights = {teacher.name: teacher.weight for teacher in teachers}
        self._is_alone = is_alone

    def labels(self, batch: PaddedBatch, device: torch.device) -> JoinedLabels | TeacherLabels:
        """The labels of a micro-batch on the student's device."""
        answer = batch.labels
        assert isinstance(answer, JoinedAnswer)
        if self._is_alone:
            (teacher,) = self._teachers
            return _labels_of(teacher, answer.by_name[teacher.name], device)
        share_of = self._shares(answer)
        by_name = {}
        for teacher in self._teachers:
            if teacher.name not in answer.by_name:
                continue
            one = answer.by_name[teacher.name]
            share_N = torch.from_numpy(np.asarray(share_of[teacher.name], np.float32)[batch.sequence_N])
            bridge = None
            if teacher.bridge is not None:
                assert one.asked.groups is not None, "a teacher with another tokenizer is asked with its groups"
                bridge = teacher.bridge(one.asked.groups, one.asked.request.batch.labels_N())
            sequences = None if len(one.sequences) == len(answer.names) else one.sequences
            by_name[teacher.name] = TeacherShare(
                _labels_of(teacher, one, device), share_N, sequences, one.asked.row_M, bridge
            )
        return JoinedLabels(by_name)

    def _shares(self, answer: JoinedAnswer) -> dict[str, list[float]]:
        sequences = {name: one.sequences for name, one in answer.by_name.items()}
        return shares(self._weights, sequences, len(answer.names))


def request_of(batch: PaddedBatch, teacher: str) -> LabelRequest:
    """What a teacher was asked, whose rows are looked at; the empty name means the only one."""
    if teacher and isinstance(batch.labels, JoinedAnswer):
        return batch.labels.by_name[teacher].asked.request
    return batch.request


def _labels_of(teacher: JoinedTeacher, answer: Answer, device: torch.device) -> TeacherLabels:
    there, checked = answer.labels.to(device), answer.labels.named.get(CHECKED_ROWS)  # the answer itself is on the host
    checked_row = None if checked is None else checked.numpy()
    return TeacherLabels(rows_on(there, teacher.head, device, checked_row=checked_row), there.named)
