"""What a teacher with another tokenizer can teach: how much of the rows, and how much of both vocabularies.

In: a session and the rows; out: a `TeacherCoverage`. The teacher is asked for what the session has not kept: the classes of ids.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from student_trainer.config.run import TrainConfig
from student_trainer.config.teachers import TeacherConfig
from student_trainer.data.cross_tokenizer.classes import Partition
from student_trainer.data.cross_tokenizer.coverage import ClassFigures, Coverage, class_figures
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.labels import event_loop
from student_trainer.model.load import Outline
from student_trainer.teachers.rows.bridged_rows import answer_of
from student_trainer.teachers.rows.bridging import Bridging, cut, teacher_rows
from student_trainer.teachers.session import TeacherSession
from teacher_wire.vocabulary.byte_table import ByteTable


@dataclass(frozen=True)
class TeacherCoverage:
    """What a teacher with another tokenizer can teach.

    Attributes:
        name: what the run calls it.
        rows: of `data.train`, those that it is asked about.
        classes: of both vocabularies.
        table: which bytes the teacher's ids stand for.
    """

    name: str
    rows: Coverage
    classes: ClassFigures
    table: ByteTable

    def figures(self) -> dict[str, float]:
        """All of them by name."""
        return self.rows.figures() | self.classes.figures()


def settings_of(config: TrainConfig, session: TeacherSession) -> TeacherConfig:
    """The section of a session's teacher; the only one may be called as its server calls it."""
    return next((one for one in config.every_teacher if one.called == session.name), config.every_teacher[0])


@dataclass(frozen=True)
class Looking:
    """What is known when a teacher's coverage is made."""

    config: TrainConfig
    settings: TeacherConfig
    student: Outline
    data: TokenizedDataset
    held_out: TokenizedDataset | None
    session: TeacherSession
    console: Console

    def coverage(self) -> TeacherCoverage:
        """Asks the teacher for what the session has not kept: the classes."""
        partition, figures, theirs = event_loop.run(self._classes())
        return TeacherCoverage(self.session.name, self._rows(partition), figures, theirs)

    async def _classes(self) -> tuple[Partition, ClassFigures, ByteTable]:
        session, info = self.session, self.session.info
        both = [row.example for rows in (self.data, self.held_out) if rows is not None for row in rows]
        bridging = Bridging(
            self.config, self.settings.cross_tokenizer, self.student, session.vocab_rows,
            [example for example in both if session.reading.is_claimed(example)], self.console, self.console.print,
        )  # fmt: skip
        async with session.service.connect() as client:
            ours, theirs = await bridging.tables(client, info)
            ours, theirs = cut(ours, session.vocab_rows), cut(theirs, teacher_rows(info))
            partition = await bridging.partition(client, info, ours, theirs)
        return partition, class_figures(partition, ours, theirs), theirs

    def _rows(self, partition: Partition) -> Coverage:
        found, bridge = Coverage(), self.session.bridge
        assert bridge is not None
        for row in self.data:
            if not self.session.reading.is_claimed(row.example):
                continue
            bridged = bridge.row(row.example)
            ids_n, wanted_n = answer_of(row.example)
            ids_N = ids_n[wanted_n]
            if bridged.view is None or bridged.alignment is None:
                found.add_masked(len(ids_N), refused=bool(bridged.refused))
            else:
                found.add(bridged.alignment, len(ids_N), int(bridged.view.loss_mask.sum()), ids_N, partition)
        return found
