"""A run that publishes its student: what must hold before step 0, and the hook that publishes after every so many steps.

In: the config, the student, the session whose teacher may move; out: a `Publishing` for the run, or refusals by the name of the setting.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from student_trainer.config.on_policy import PublishConfig
from student_trainer.config.run import TrainConfig
from student_trainer.errors import ConfigError, RunError
from student_trainer.labels import event_loop
from student_trainer.labels.lineage import REVISIONS_NAME, Lineage, origin_of
from student_trainer.model.load import Student
from student_trainer.model.merged import check_mergeable, trains_head
from student_trainer.model.quantized.weights import merged_bytes, plain_config
from student_trainer.rollout.publication.publisher import Publisher, Target
from student_trainer.teachers.connect import Connection
from student_trainer.teachers.session import TeacherSession
from teacher_wire.artifacts.kinds.output_head import OUTPUT_HEAD
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.core.identity import tokenizer_sha256
from teacher_wire.core.info import TeacherInfo
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.publish.messages import MIN_FILE_BYTES, Publication, RevisionFile


@dataclass(frozen=True)
class Publishing:
    """What a run that publishes needs.

    Attributes:
        settings: of the section.
        student: that is published.
        target: where to.
        info: of the teacher whose revisions they are, as it is met.
    """

    settings: PublishConfig
    student: Student
    target: Target
    info: TeacherInfo

    def moves(self, session: TeacherSession | None) -> bool:
        """Whether the labels of a session are of the teacher that is published."""
        return session is not None and session.info.name == self.info.name

    def origin(self, folder: Path, session: TeacherSession) -> str:
        """What a session's teacher is to the identity of a run: the fingerprint it was begun with, while the run itself moves it."""
        return origin_of(folder / REVISIONS_NAME, session.info) if self.moves(session) else session.info.fingerprint

    def begin(
        self, folder: Path, session: TeacherSession | None, first_batch: int, tell: Callable[[str], None]
    ) -> tuple[Publisher, TeacherSession | None]:
        """The publisher, and the session with labels that move along, once there is a run folder."""
        lineage = Lineage(
            session.info if session is not None and self.moves(session) else self.info,
            folder / REVISIONS_NAME,
            first_batch,
            self.origin(folder, session) if session is not None else "",
        )
        if session is not None and self.moves(session):
            measuring = session.measuring
            if measuring is not None and "hidden" in measuring.kinds and not _keeps_head(session, self.student):
                measuring = None
            session = replace(session, measuring=measuring, service=replace(session.service, lineage=lineage))
        stops = self.settings.on_failure == "stop"
        return Publisher(self.student, self.target, folder, lineage, tell, stops=stops), session


def open_publishing(
    config: TrainConfig,
    student: Student,
    session: TeacherSession | None,
    connections: list[Connection],
    tell: Callable[[str], None],
) -> Publishing | None:
    """What publishing needs, looked at before step 0; None if the run publishes nothing.

    Raises:
        ConfigError, ModelError: settings or a student that cannot be published, by name.
        TeacherWireError: the server would not take it; why.
    """
    settings = config.on_policy.publish if config.on_policy is not None else None
    if settings is None:
        return None
    if not connections:
        raise ConfigError("on_policy.publish needs a server: set the section teacher")
    check_mergeable(student)
    connect = partial(_client, replace(connections[0], name=settings.teacher), tell)
    info = event_loop.run(_ask(connect, student, settings))
    target = Target(settings.teacher, _tokenizer(student), connect)
    publishing = Publishing(settings, student, target, info)
    if info.revision:
        goes_on = "the run begins with its labels" if publishing.moves(session) else "the first of this run replaces it"
        tell(f"teacher {info.name} holds a published revision already, {info.revision[:12]}; {goes_on}")
    if session is not None and publishing.moves(session):
        _check_labels(session, student)
        publishing = replace(publishing, target=replace(target, fits=partial(_check_head, session)))
        if session.measuring is not None and "hidden" in session.measuring.kinds and not _keeps_head(session, student):
            tell("kl_to_teacher is not measured: the teacher's output head changes with every published revision")
    return publishing


def _client(connection: Connection, tell: Callable[[str], None]) -> TeacherClient:
    said: list[str] = []

    def on_trouble(error: TeacherWireError) -> None:
        if error.message not in said:
            said.append(error.message)
            tell(f"publishing: {error}; trying again")

    return connection.client(on_trouble)


def _tokenizer(student: Student) -> str:
    return tokenizer_sha256(student.tokenizer.backend_tokenizer.to_str())


async def _ask(connect: Callable[[], TeacherClient], student: Student, settings: PublishConfig) -> TeacherInfo:
    """The teacher, whose server says that it would take such a revision."""
    config = plain_config(student.causal_lm.config).to_diff_dict()
    config["architectures"] = [type(student.causal_lm).__name__]
    size = max(MIN_FILE_BYTES, merged_bytes(student.causal_lm))
    asked = Publication(
        settings.teacher, json.dumps(config, default=str).encode(), _tokenizer(student),
        (RevisionFile("model.safetensors", size, "0" * 64),), check_only=True,
    )  # fmt: skip
    async with connect() as client:
        try:
            info = await client.teacher(settings.teacher)
            await client.publish(asked, [])
        except TeacherWireError as error:
            error.add_note(
                f"on_policy.publish.teacher={settings.teacher}: the server takes no revisions from this run (docs/operate/publishing.md); without on_policy.publish it trains"
            )
            raise
    return info


def _check_labels(session: TeacherSession, student: Student) -> None:
    """Refuses labels that are of something which changes with every revision and is fetched once.

    Raises:
        ConfigError: naming the setting.
    """
    if session.features is not None and session.features.needs_basis:
        raise ConfigError(
            "loss: states of layers are projected on a basis that every published revision has anew; leave loss.hidden out, or publish to another teacher"
        )
    if "hidden" in session.spec.kinds and not _keeps_head(session, student):
        raise ConfigError(
            "labels.transport=hidden needs the teacher's output head, fetched once; that of a published revision is the student's own, which "
            "it trains (or which is not the teacher's from the start): set labels.transport=top_k, or model.lora without the head"
        )


def _keeps_head(session: TeacherSession, student: Student) -> bool:
    """Whether every published revision has the very output head that the teacher has now."""
    if trains_head(student) or session.head is None:
        return False
    theirs, own = session.head.weight_VD, student.head(session.vocab_rows).weight_VD.detach()
    return theirs.shape == own.shape and torch.equal(own.to(theirs.dtype), theirs)


def _check_head(session: TeacherSession, info: TeacherInfo) -> None:
    """Refuses a revision whose output head is not the one that labels are held against.

    Raises:
        RunError: naming both.
    """
    if "hidden" not in session.spec.kinds:
        return
    before, now = session.info.artifact(OUTPUT_HEAD), info.artifact(OUTPUT_HEAD)
    if before.sha256 != now.sha256:
        raise RunError(
            f"the revision's output head {now.sha256[:12]} is not the teacher's {before.sha256[:12]}, by which labels.transport=hidden is "
            "read: serve the teacher in the dtype of model.dtype, or set labels.transport=top_k"
        )


class PublishAfterSteps(TrainerCallback):
    """Publishes after every so many optimizer steps.

    Args:
        publisher: of the run.
        every: steps.
        settle: raises if labels that the weights have learned from are refused.
    """

    def __init__(self, publisher: Publisher, every: int, settle: Callable[[], None]) -> None:
        self._publisher = publisher
        self._every = every
        self._settle = settle

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by transformers."""
        self._publisher.check()
        if state.global_step % self._every == 0:
            self._settle()
            self._publisher.publish(state.global_step)
