"""What joins the rows of a teacher with another tokenizer to the student's: classes of ids, and groups of rows (docs/concepts/method.md 8.4).

Axes: Vs ids of the student, Vt of the teacher, K classes; N supervised rows of the student in a micro-batch, M of the teacher; G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.cross_tokenizer.projection import SideOfClasses

GIANT = 64  # ids of a class, above which a row that has most of its mass in it says too little of which token is meant


@dataclass(frozen=True, eq=False)
class VocabularyClasses:
    """A partition of both vocabularies in which every class has ids of both sides; constant over a run, on the student's device.

    Attributes:
        student_Vs: int64, class of each id of the student.
        teacher_Vt: int64, likewise of the teacher.
        classes: K.
    """

    student_Vs: Tensor
    teacher_Vt: Tensor
    classes: int

    @cached_property
    def of_student(self) -> SideOfClasses:
        """The student's ids, as losses sum over them.

        Raises:
            DataError: as `SideOfClasses.of`.
        """
        return SideOfClasses.of(self.student_Vs, self.classes, "student")

    @cached_property
    def of_teacher(self) -> SideOfClasses:
        """The teacher's, likewise."""
        return SideOfClasses.of(self.teacher_Vt, self.classes, "teacher")

    @cached_property
    def giants(self) -> Tensor | None:
        """int64, classes of more than `GIANT` ids of both sides together; None if there are none."""
        giant = np.flatnonzero(self.of_student.size_K + self.of_teacher.size_K > GIANT)
        return torch.from_numpy(giant).to(self.student_Vs.device) if giant.size else None

    @cached_property
    def is_giant_K(self) -> Tensor:
        """bool, of each class."""
        is_giant_K = torch.from_numpy(self.of_student.size_K + self.of_teacher.size_K > GIANT)
        return is_giant_K.to(self.student_Vs.device)


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of a micro-batch, on the host; `data.cross_tokenizer.alignment` makes those of a sequence.

    Attributes:
        student_G2: int64, half-open ranges among the N rows, rising, without overlap.
        teacher_G2: int64, among the M rows, likewise.
    """

    student_G2: np.ndarray
    teacher_G2: np.ndarray


@dataclass(frozen=True, eq=False)
class Bridge:
    """See module.

    Attributes:
        classes: of the two vocabularies.
        groups: of this micro-batch.
        labels_M: int64, on the host: the teacher's tokens that its M rows describe, in its own ids.
        alm_weight: of the groups that are not 1-1, a token.
        alm_temperature: tau_b of their binary cross-entropy.
    """

    classes: VocabularyClasses
    groups: Groups
    labels_M: Tensor
    alm_weight: float = 0.5
    alm_temperature: float = 100.0
