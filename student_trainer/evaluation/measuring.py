"""The function by which a run measures its held-out rows: labels are asked for once and kept while they fit.

In: a config, the student, the rows, the sessions; out: a function without arguments that gives figures. With one teacher the figures are
those of `heldout.measure`; with several, or with one that is asked about some rows alone or has another tokenizer, of each its KL.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from student_trainer.config.run import TrainConfig
from student_trainer.data.batch_plan import by_length
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.evaluation import heldout
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.packing import pack
from student_trainer.labels.source import LabelRequest
from student_trainer.losses.cross_tokenizer.bridge import Bridge
from student_trainer.model.load import Student
from student_trainer.teachers.feeds import open_any_feed
from student_trainer.teachers.rows.reading import AskedRows
from student_trainer.teachers.session import TeacherSession
from teacher_wire.core.errors import OverloadedError, UnavailableError

Figures = Callable[[], dict[str, float]]


def measuring(
    config: TrainConfig,
    student: Student,
    held_out: TokenizedDataset,
    sessions: Sequence[TeacherSession],
    vocab_rows: int,
    note: Callable[[str], None] = lambda told: None,
) -> Figures:
    """A function that measures the held-out rows; labels that fit feed.max_mb are kept for the next time.

    Args:
        vocab_rows: V, ids that the student shares with the teachers of its tokenizer.
        note: called with a sentence about a teacher that does not answer and need not (`when_missing: reweight`): its figure is left out.
    """
    asked = [session for session in sessions if session.measuring is not None]
    plain = all(session.bridge is None and session.reading.routing is None for session in sessions)
    if plain:
        return _of_one(config, student, held_out, asked[0] if asked else None, vocab_rows)
    return _of_several(config, student, held_out, asked, len(sessions) == 1, vocab_rows, note)


def _of_one(
    config: TrainConfig, student: Student, held_out: TokenizedDataset, session: TeacherSession | None, vocab_rows: int
) -> Figures:
    size = config.train.eval_batch_size
    groups = by_length(held_out, size)
    kept: dict[int, LabelTensors] = {}
    measured = partial(heldout.measure, student, held_out, size, vocab_rows, chunk_bytes=config.loss.chunk_mb << 20)

    def request(number: int) -> LabelRequest:
        return pack([held_out[index].example for index in groups[number]])

    lineage = session.service.lineage if session is not None else None
    measured_with: list[str] = []

    def run() -> dict[str, float]:
        if session is None or session.measuring is None:
            return measured()
        if lineage is not None and measured_with != [lineage.info.fingerprint]:
            measured_with[:] = [lineage.info.fingerprint]
            kept.clear()  # of another revision
        if len(kept) == len(groups):
            return measured(labels=kept.__getitem__, teacher_head=session.head)
        kept.clear()
        feed = open_any_feed(config, session, session.measuring, request, 0, len(groups), prepare=LabelTensors.of)

        def take(number: int) -> LabelTensors:
            labels: LabelTensors = feed.take(number).ready
            if sum(other.nbytes for other in kept.values()) + labels.nbytes <= config.feed.max_mb << 20:
                kept[number] = labels
            return labels

        try:
            return measured(labels=take, teacher_head=session.head)
        finally:
            feed.close()

    return run


@dataclass
class _Asked:
    """One of several teachers: what it is asked about the held-out rows, batch by batch, and what is kept of its answers.

    Attributes:
        session: with it.
        batches: number of a batch -> what it is asked; those it is asked nothing about are not there.
        kept: its answers by number of the batch.
    """

    session: TeacherSession
    batches: dict[int, AskedRows]
    kept: dict[int, LabelTensors] = field(default_factory=dict)

    def bridge(self, number: int) -> Bridge | None:
        plan, asked = self.session.bridge, self.batches[number]
        if plan is None or asked.groups is None:
            return None
        return plan.bridge(asked.groups, asked.request.batch.labels_N())


def _of_several(
    config: TrainConfig,
    student: Student,
    held_out: TokenizedDataset,
    sessions: Sequence[TeacherSession],
    is_only: bool,
    vocab_rows: int,
    note: Callable[[str], None],
) -> Figures:
    size = config.train.eval_batch_size
    groups = [[held_out[index].example for index in group] for group in by_length(held_out, size)]
    teachers = []
    for session in sessions:
        found = {number: session.asked(examples) for number, examples in enumerate(groups)}
        teachers.append(_Asked(session, {number: asked for number, asked in found.items() if asked is not None}))

    def run() -> dict[str, float]:
        with contextlib.ExitStack() as feeds:
            several = [
                heldout.OneTeacher(
                    "teacher" if is_only else teacher.session.name,
                    teacher.session.head,
                    _taking(config, teacher, teachers, feeds, note),
                )
                for teacher in teachers
            ]
            return heldout.measure(
                student, held_out, size, vocab_rows, several=several, chunk_bytes=config.loss.chunk_mb << 20
            )

    return run


def _taking(
    config: TrainConfig,
    teacher: _Asked,
    every: Sequence[_Asked],
    feeds: contextlib.ExitStack,
    note: Callable[[str], None],
) -> Callable[[int], heldout.Answered | None]:
    """Number of a batch -> what the teacher has answered about it; a feed is opened for what is not kept."""
    numbers = list(teacher.batches)
    place = {number: i for i, number in enumerate(numbers)}
    spec = teacher.session.measuring
    assert spec is not None
    missing = len(teacher.kept) < len(numbers)
    if missing:
        teacher.kept.clear()
    feed = None
    if missing and numbers:
        feed = open_any_feed(
            config,
            teacher.session,
            spec,
            lambda i: teacher.batches[numbers[i]].request,
            0,
            len(numbers),
            prepare=LabelTensors.of,
        )
        feeds.callback(feed.close)

    def take(number: int) -> heldout.Answered | None:
        if number not in place:
            return None
        labels = teacher.kept.get(number)
        if labels is None:
            assert feed is not None
            try:
                labels = feed.take(place[number]).ready
            except (UnavailableError, OverloadedError) as error:
                if teacher.session.when_missing != "reweight":
                    raise
                note(
                    f"teacher {teacher.session.name!r} is away ({error}): kl_to_{teacher.session.name} is not measured this time"
                )
                raise heldout.Unanswered(teacher.session.name) from error
            held = sum(other.nbytes for one in every for other in one.kept.values())
            if held + labels.nbytes <= config.feed.max_mb << 20:
                teacher.kept[number] = labels
        asked = teacher.batches[number]
        return heldout.Answered(labels, asked.row_M, teacher.bridge(number), asked.request.names)

    return take
