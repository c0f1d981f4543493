"""What is different in a run that learns from several teachers: its terms, its feed, its labels, its ledger, and what is said at its end.

In: the sessions of a run; out: the parts that `run.py` puts together, None for a run with one teacher, which goes its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from student_trainer.config.losses import LossConfig
from student_trainer.config.run import TrainConfig
from student_trainer.errors import ConfigError, TeacherAwayError
from student_trainer.labels.joined.feed import JoinedFeed
from student_trainer.labels.joined.ledger import TeachersLedger
from student_trainer.losses.features.term import PairedTerm
from student_trainer.losses.output.parts import Joining
from student_trainer.losses.term import LossTerm
from student_trainer.losses.total import check_needs, taps_of
from student_trainer.model.forward import blocks_of
from student_trainer.model.load import Student
from student_trainer.teachers.feeds import MicroBatches, open_joined_feed
from student_trainer.teachers.session import TeacherSession
from student_trainer.training.checkpoints.checkpoint_rotation import KeepingTrainer
from student_trainer.training.joined.joiner import JoinedTeacher, Joiner
from student_trainer.training.layer_terms import told_weight
from student_trainer.training.objective import Objective
from teacher_wire.core.errors import OverloadedError, UnavailableError


@dataclass(frozen=True)
class JoinedTeachers:
    """The teachers of a run with a list of them, or with one of another tokenizer.

    Attributes:
        config: of the run.
        sessions: in the order of the config.
        ledger: of who has labelled what.
        note: told what a user should know, a sentence at a time.
    """

    config: TrainConfig
    sessions: tuple[TeacherSession, ...]
    ledger: TeachersLedger
    note: Callable[[str], None]

    @classmethod
    def of(
        cls, config: TrainConfig, sessions: Sequence[TeacherSession], folder: Path, note: Callable[[str], None]
    ) -> JoinedTeachers | None:
        """None for a run that learns from no teacher, or from one as the section `teacher` says.

        Args:
            folder: of the run, for the ledger.

        Raises:
            ConfigError: a setting that is for the section `teacher` alone.
        """
        if config.loss.output is None or not sessions:
            return None
        if not config.teachers and all(session.bridge is None for session in sessions):
            return None
        _check_settings(config, sessions)
        return cls(config, tuple(sessions), TeachersLedger(folder, config.train.accumulation), note)

    @property
    def is_alone(self) -> bool:
        """Whether there is one teacher with the student's tokenizer that is asked about every row."""
        return len(self.sessions) == 1 and self.sessions[0].bridge is None and not self.sessions[0].tags

    @property
    def of_features(self) -> TeacherSession | None:
        """The first whose layers are learned from: layers.json compares the student with it."""
        return next((session for session in self.sessions if session.features is not None), None)

    def terms(self, objective: Objective, student: Student) -> list[LossTerm]:
        """The terms of `objective`, those on layers with the name of the teacher whose layers they are.

        Raises:
            ConfigError: a teacher does not give what they need.
        """
        names = tuple(session.name for session in self.sessions)
        bridged = frozenset(session.name for session in self.sessions if session.bridge is not None)
        joining = Joining(names, bridged, self.config.combine)
        output = replace(objective, loss=_with_sections(objective, ()), features=None, joining=joining)
        terms = output.terms(student)
        for session, own in self._of_layers(objective):
            of_layers = [term for term in own.terms(student) if isinstance(term, PairedTerm)]
            for term in of_layers:
                term.teacher = session.name
            blocks = len(blocks_of(student.body)) if taps_of(of_layers) else 0
            check_needs(of_layers, session.name, session.info.transports, blocks)
            terms += of_layers
        return terms

    def told_weight(self, objective: Objective, student: Student) -> str:
        """As `layer_terms.told_weight`."""
        return next((told for _, own in self._of_layers(objective) if (told := told_weight(own, student))), "")

    def _of_layers(self, objective: Objective) -> list[tuple[TeacherSession, Objective]]:
        """Each teacher whose layers are learned from, and the part of the objective that says how."""
        return [
            (session, replace(objective, loss=_with_sections(objective, tuple(plan.pairs)), features=plan))
            for session in self.sessions
            if (plan := session.features) is not None
        ]

    def joiner(self) -> Joiner:
        """What makes labels of their answers."""
        teachers = [
            JoinedTeacher(
                session.name,
                session.weight,
                session.head,
                session.bridge.bridge if session.bridge is not None else None,
            )
            for session in self.sessions
        ]
        return Joiner(teachers, is_alone=self.is_alone)

    def open_feed(self, windows: MicroBatches, first: int) -> JoinedFeed:
        """Their feed, from micro-batch `first` on."""
        return open_joined_feed(self.config, self.sessions, windows, self.note, self.ledger.add, first)

    def end(self) -> None:
        """Says how many samples had fewer teachers than they were to have."""
        if told := self.ledger.told():
            self.note(told)


def _check_settings(config: TrainConfig, sessions: Sequence[TeacherSession]) -> None:
    """Refuses what the feed of several teachers cannot do; also of a list of one, which has tags or another policy than `wait`."""
    for session in sessions:
        if session.labels.extra_ids:
            raise ConfigError(
                f"labels.extra_ids={session.labels.extra_ids} of teacher {session.name!r}: is for the section teacher: use it in place of "
                "teachers, or set labels.extra_ids to 0"
            )
    if config.on_policy is not None and config.on_policy.publish is not None:
        raise ConfigError(
            "on_policy.publish moves the weights of the one teacher of the section teacher: use it in place of teachers, or set publish to null"
        )


def who_is_away(error: BaseException) -> TeacherAwayError | None:
    """What a run ends with that ends with `error`, if it is that a teacher does not answer: in a step, or where held-out rows are measured."""
    if isinstance(error, TeacherAwayError):
        return error
    if isinstance(error, UnavailableError | OverloadedError):
        return TeacherAwayError(f"a teacher does not answer: {error}")
    return None


def keep_last_step(error: TeacherAwayError, trainer: KeepingTrainer) -> None:
    """Writes a checkpoint of the last whole step of a run that ends since a teacher is away, and says how to go on."""
    kept = trainer.keep_last_step()
    error.add_note(
        f"go on when it is back: --resume (from {kept.name})"
        if kept
        else "nothing was learned yet: start the run again when it is back"
    )


def shared_vocabulary(sessions: Sequence[TeacherSession], own_rows: int) -> int:
    """V, the ids that the student shares with every teacher of its tokenizer; its own if there is none.

    Raises:
        ConfigError: it shares more of them with one than with another.
    """
    rows = {session.name: session.vocab_rows for session in sessions if session.bridge is None}
    if len(set(rows.values())) > 1:
        told = ", ".join(f"{count} with {name!r}" for name, count in rows.items())
        raise ConfigError(
            f"teachers: the student shares {told} of its token ids; several teachers of its tokenizer must share the same ids: leave one out"
        )
    return next(iter(rows.values()), own_rows)


def _with_sections(objective: Objective, kept: Sequence[str]) -> LossConfig:
    """Its section `loss` with no other sections on layers than these."""
    off = {name: None for name in objective.loss.features if name not in kept}
    return objective.loss.model_copy(update=off)
