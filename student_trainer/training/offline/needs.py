"""Every label that a run will ask for, as jobs: a pure function of its config, its rows and its teachers.

In: a session and the rows; out: requests of one signal over one set of rows, in the order in which the run comes to them. `label` fills them in,
a run with an offline teacher looks for them before step 0, and `plan` says how many and how large they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from student_trainer.config.run import TrainConfig
from student_trainer.data.batch_plan import by_length
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.data.inputs import asked_order
from student_trainer.data.teacher_view import TeacherView
from student_trainer.evaluation.layer_similarity import MOST_ROWS
from student_trainer.labels.source import LabelRequest
from student_trainer.teachers.session import TeacherSession
from teacher_wire.artifacts.kinds.output_head import OUTPUT_HEAD
from teacher_wire.core.info import LAYER_BASIS, ArtifactInfo
from teacher_wire.core.signals import SignalSpec
from teacher_wire.labels.store import label_keys


@dataclass(frozen=True)
class Job:
    """Requests of one signal of one teacher over one dataset.

    Attributes:
        title: what they are for: `eval`, `train` or `layers`.
        session: of the teacher.
        spec: the signal.
        data: the rows.
        groups: indices of the rows of each request, each distinct sequence once.
    """

    title: str
    session: TeacherSession
    spec: SignalSpec
    data: TokenizedDataset
    groups: list[list[int]]

    def request(self, number: int) -> LabelRequest:
        """What is asked about the rows of group `number`."""
        asked = self.session.request([self.data[index].example for index in self.groups[number]])
        assert asked is not None, "a teacher is asked about all rows of its groups"
        return asked

    @property
    def views(self) -> list[TeacherView]:
        """What the teacher is asked about, as it reads it."""
        return [self.session.reading.view(self.data[index].example) for group in self.groups for index in group]


def jobs_of(
    config: TrainConfig, sessions: Sequence[TeacherSession], data: TokenizedDataset, held_out: TokenizedDataset | None
) -> list[Job]:
    """All jobs of a run.

    Measuring comes first: its labels are checked in every row, and serve training too where a sequence is in both datasets. With a
    curriculum every row is asked about, since the order of the rows follows from the teacher's word on each.
    """
    seen: set[str] = set()
    jobs = []
    for session in sessions:
        if held_out is not None and session.measuring is not None:
            by_size = by_length(held_out, config.train.eval_batch_size)
            groups = _distinct(session, session.measuring, held_out, by_size, seen)
            jobs.append(Job("eval", session, session.measuring, held_out, groups))
        if config.loss.output is not None:
            groups = _distinct(session, session.spec, data, _batches(config, data), seen)
            jobs.append(Job("train", session, session.spec, data, groups))
        if session.features is not None:  # the report on layers measures them alone, before and after
            spec = replace(session.spec, signals=tuple(session.features.signals.values()), check="all")
            rows = held_out or data
            first = [[index] for index in range(min(len(rows), MOST_ROWS))]
            jobs.append(Job("layers", session, spec, rows, _distinct(session, spec, rows, first, seen)))
    return jobs


def artifacts_of(session: TeacherSession) -> Iterator[ArtifactInfo]:
    """What a run needs of a teacher beside labels and is kept on disk: its head, and the basis of its layers."""
    if "hidden" in (*session.spec.kinds, *(session.measuring.kinds if session.measuring else ())):
        yield session.info.artifact(OUTPUT_HEAD)
    if session.features is not None and session.features.needs_basis:
        yield session.info.artifact(LAYER_BASIS)


def _batches(config: TrainConfig, data: TokenizedDataset) -> Iterable[list[int]]:
    """The rows of every micro-batch of the run, in order; with a curriculum all rows."""
    order = asked_order(config, data)
    return (order.batch(number) for number in range(order.batches))


def _distinct(
    session: TeacherSession, spec: SignalSpec, data: TokenizedDataset, batches: Iterable[list[int]], seen: set[str]
) -> list[list[int]]:
    """Each batch without the sequences that are in `seen`, where all are put; no empty one."""
    key_of: dict[int, str] = {}
    every_row = replace(spec, check="all")  # whichever rows are checked, the labels are the same
    groups = []
    for group in batches:
        fresh = []
        for index in group:
            if index not in key_of:
                asked = session.request([data[index].example])
                if asked is None:  # somebody else's row
                    key_of[index] = ""
                    continue
                key_of[index] = label_keys(session.info.fingerprint, every_row, asked.batch)[0]
                if key_of[index] not in seen:
                    fresh.append(index)
                    seen.add(key_of[index])
        if fresh:
            groups.append(fresh)
    return groups
