"""Which tokens of a text in one tokenizer stand for the same bytes as which in another (algorithms.md 8.3).

In: the ids of one completion in both, with their byte tables; out: groups, which end at the same byte on both sides and at none before.

Axes: G groups; N supervised rows of the student's sequence, M of the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Alignment:
    """Groups of one sequence, in the order of the text. Rows in no group are of no use to the other side.

    Attributes:
        student_G2: int32, half-open ranges among the supervised rows of the student's sequence.
        teacher_G2: int32, likewise of the teacher's.
        is_control_G: bool, groups of two control tokens that have the same role, such as the ends of turn; 1-1 always.
    """

    student_G2: np.ndarray
    teacher_G2: np.ndarray
    is_control_G: np.ndarray

    @property
    def groups(self) -> int:
        return len(self.student_G2)
