"""The groups of a micro-batch, from those of its sequences.

In: an alignment for each of the student's sequences, in the order of the micro-batch; out: `Groups` over its rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from student_trainer.data.cross_tokenizer.alignment import Alignment
from student_trainer.losses.cross_tokenizer.bridge import Groups


class AlignedRows(NamedTuple):
    """One sequence of the student in a micro-batch.

    Attributes:
        alignment: its groups; None if the teacher does not label it.
        student_rows: its supervised rows.
        teacher_rows: rows that the teacher's answer has for it; 0 if it does not label it.
    """

    alignment: Alignment | None
    student_rows: int
    teacher_rows: int


def join_groups(sequences: Iterable[AlignedRows]) -> Groups:
    """The groups of all sequences, counted in rows of the micro-batch.

    Args:
        sequences: all of the micro-batch in order, those that the teacher does not label among them.

    Returns:
        ranges among the N rows of the student and the M rows of the teacher's answer.
    """
    student: list[np.ndarray] = []
    teacher: list[np.ndarray] = []
    student_at = teacher_at = 0
    for alignment, student_rows, teacher_rows in sequences:
        if alignment is not None:
            assert alignment.groups == 0 or int(alignment.student_G2[-1, 1]) <= student_rows, "groups beyond the rows"
            assert alignment.groups == 0 or int(alignment.teacher_G2[-1, 1]) <= teacher_rows, "groups beyond the rows"
            student.append(alignment.student_G2.astype(np.int64) + student_at)
            teacher.append(alignment.teacher_G2.astype(np.int64) + teacher_at)
        student_at += student_rows
        teacher_at += teacher_rows
    none_02 = np.zeros((0, 2), np.int64)
    return Groups(np.concatenate([none_02, *student]), np.concatenate([none_02, *teacher]))
