"""How one teacher of a run reads its rows: which of them it is asked about, and what it is asked.

In: examples; out: requests, and which rows of the student the answers describe. It knows no connection.

Axes: B sequences of a micro-batch, N supervised rows of the student in it, M rows of the teacher's answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from student_trainer.data.cross_tokenizer.groups import AlignedRows, join_groups
from student_trainer.data.dataset import Example
from student_trainer.data.routing import Routing
from student_trainer.data.teacher_view import TeacherView
from student_trainer.labels.packing import pack_views
from student_trainer.labels.source import LabelRequest
from student_trainer.losses.cross_tokenizer.bridge import Bridge, Groups, VocabularyClasses
from student_trainer.teachers.rows.bridged_rows import BridgedRow, row_key


@dataclass(frozen=True, eq=False)
class AskedRows:
    """What one teacher is asked about a micro-batch.

    Attributes:
        request: what is sent: the sequences that it is responsible for, in order, as it reads them.
        sequences: which of the B these are, rising.
        row_M: int64, which of the N rows each row of the answer describes; None if they are all N in order, and for another tokenizer.
        groups: of rows of both sides, for a teacher with another tokenizer; None for the student's.
    """

    request: LabelRequest
    sequences: tuple[int, ...]
    row_M: np.ndarray | None = None
    groups: Groups | None = None


@dataclass(frozen=True, eq=False)
class BridgePlan:
    """What joins a teacher with another tokenizer to the student.

    Attributes:
        classes: of the two vocabularies, on the student's device; None where nothing is computed with the labels.
        rows: of the run by `bridged_rows.row_key`: as the teacher reads them, with their alignment.
        alm_weight, alm_temperature: as configured.
        digest: of what decides how rows and ids are joined: both tokenizers, both byte tables, the rule of the classes.
    """

    classes: VocabularyClasses | None
    rows: Mapping[bytes, BridgedRow]
    alm_weight: float
    alm_temperature: float
    digest: str

    def row(self, example: Example) -> BridgedRow:
        """An example of this run as the teacher reads it."""
        return self.rows[row_key(example)]

    def bridge(self, groups: Groups, labels_M: np.ndarray) -> Bridge:
        """What the losses read of a micro-batch.

        Args:
            groups: as `AskedRows.groups`.
            labels_M: the teacher's tokens that its rows describe, `AskedRows.request.batch.labels_N()`.
        """
        import torch

        assert self.classes is not None, "only labels are wanted here"
        return Bridge(
            self.classes,
            groups,
            labels_M=torch.from_numpy(labels_M).long(),
            alm_weight=self.alm_weight,
            alm_temperature=self.alm_temperature,
        )


@dataclass(frozen=True, eq=False)
class Reading:
    """See module.

    Attributes:
        name: of the teacher in the run.
        routing: of rows among the teachers; None: every row.
        bridge: to a teacher with another tokenizer; None for the student's.
    """

    name: str
    routing: Routing | None = None
    bridge: BridgePlan | None = None

    def is_claimed(self, example: Example) -> bool:
        """Whether its tags give a row to this teacher."""
        return self.routing is None or self.name in self.routing.asked(example.tags)

    def responsible(self, example: Example) -> bool:
        """Whether the teacher is asked about a row: its tags say so, and another tokenizer's tokens can be joined to enough of its own."""
        return self.is_claimed(example) and (self.bridge is None or self.bridge.row(example).view is not None)

    def view(self, example: Example) -> TeacherView:
        """What the teacher reads of a row that it is responsible for."""
        if self.bridge is None:
            return example.asked_by(self.name)
        view = self.bridge.row(example).view
        assert view is not None, f"{self.name} is not responsible for {example.key}"
        return view

    def request(self, examples: Sequence[Example]) -> LabelRequest | None:
        """What the teacher is asked about these examples; None if it is responsible for none of them."""
        asked = [example for example in examples if self.responsible(example)]
        return (
            pack_views([self.view(example) for example in asked], [example.key for example in asked]) if asked else None
        )

    def asked(self, examples: Sequence[Example]) -> AskedRows | None:
        """`request`, with what the answer is about."""
        request = self.request(examples)
        if request is None:
            return None
        sequences = tuple(b for b, example in enumerate(examples) if self.responsible(example))
        if self.bridge is not None:
            return AskedRows(request, sequences, groups=join_groups(map(self._aligned, examples)))
        if len(sequences) == len(examples):
            return AskedRows(request, sequences)
        rows_B = np.array([int(example.loss_mask.sum()) for example in examples])
        is_asked_B = np.zeros(len(examples), np.bool_)
        is_asked_B[list(sequences)] = True
        return AskedRows(request, sequences, np.flatnonzero(np.repeat(is_asked_B, rows_B)))

    def _aligned(self, example: Example) -> AlignedRows:
        rows = int(example.loss_mask.sum())
        if not self.responsible(example):
            return AlignedRows(None, rows, 0)
        assert self.bridge is not None
        found = self.bridge.row(example)
        assert found.alignment is not None
        return AlignedRows(found.alignment, rows, int(self.view(example).loss_mask.sum()))
