"""How near the student's layers are to the teacher's, before the first step and after the last: what a run with features adds to its folder.

In: a session, held-out rows, the terms; out: layers.json and layers.png. The teacher's labels of these rows are asked for one sequence at a
time, since no limit of a request may stand in the way of a picture; they are kept as others are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from student_trainer.data.dataset import IndexedExample, TokenizedDataset
from student_trainer.evaluation.layer_similarity import (
    BATCH,
    MOST_ROWS,
    keep_before,
    measure_layers,
    write_layers,
)
from student_trainer.files import disk_trouble_named
from student_trainer.labels import event_loop
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.packing import pack
from student_trainer.losses.features.layers import LayerPair
from student_trainer.losses.term import LossTerm
from student_trainer.model.load import Student
from student_trainer.teachers.session import TeacherSession
from teacher_wire.core.signals import TeacherSignals


class LayerReport:
    """See module; held-out rows, or without them those of the training data that come first.

    Args:
        session: whose features the run learns from.
        terms: on features.
        data: rows that are measured, the first MOST_ROWS.
        folder: of the run, which is there when `begin` is called.
    """

    def __init__(
        self, student: Student, session: TeacherSession, terms: Sequence[LossTerm], data: TokenizedDataset, folder: Path
    ) -> None:
        assert session.features is not None
        self._student = student
        self._session = session
        self._terms = terms
        self._states: tuple[LayerPair, ...] = session.features.pairs.get("hidden", ())
        self._rows = [data[index] for index in range(min(len(data), MOST_ROWS))]
        self._folder = folder
        self._before: dict[str, float] = {}

    def begin(self, *, resumed: bool) -> None:
        """Measures the student as it is before step 0; of a resumed run, reads what was measured then.

        Raises:
            RunError: the disk does not take the file.
            LabelError, TeacherWireError: the teacher does not give the labels.
        """
        with disk_trouble_named(f"run.output_dir {self._folder}"):
            self._before = keep_before(self._folder, self._measure, resumed=resumed)

    def end(self) -> None:
        """Measures the trained student, and writes what was found; raises as `begin`."""
        with disk_trouble_named(f"run.output_dir {self._folder}"):
            write_layers(self._folder, self._before, self._measure())

    def _measure(self) -> dict[str, float]:
        parts = [self._rows[first : first + BATCH] for first in range(0, len(self._rows), BATCH)]
        labelled = [(part, LabelTensors.of(event_loop.run(self._labels(part)))) for part in parts]
        return measure_layers(self._student, self._terms, self._states, labelled)

    async def _labels(self, rows: Sequence[IndexedExample]) -> TeacherSignals:
        plan = self._session.features
        assert plan is not None
        spec = replace(self._session.spec, signals=tuple(plan.signals.values()), check="all")
        async with self._session.service.connect() as client:
            source = self._session.service.source(self._session.info, spec, connect=lambda: client)
            found = await asyncio.gather(*(source.labels(pack([row.example])) for row in rows))
        return TeacherSignals.join([labels.signals for labels in found])
