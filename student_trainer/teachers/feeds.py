"""Feeds of labels from the sessions of a run, each ahead of the steps that need it: one per session and signal, or one of all sessions.

In: sessions and numbered requests; out: a `LabelFeed` or a `JoinedFeed` within the bounds of the section `feed`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from student_trainer.config.run import TrainConfig
from student_trainer.data.dataset import IndexedExample
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.joined.answer import AskedAll, AskedOne, JoinedAnswer
from student_trainer.labels.joined.feed import JoinedFeed
from student_trainer.labels.joined.lane import AskedTeacher, patience_s
from student_trainer.labels.late_requests import ProvidedRequests
from student_trainer.labels.prefetch import LabelFeed
from student_trainer.labels.source import LabelRequest
from student_trainer.teachers.session import TeacherSession
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.endpoint.client import TeacherClient

log = logging.getLogger(__name__)


def open_any_feed(
    config: TrainConfig,
    session: TeacherSession,
    spec: SignalSpec,
    request: Callable[[int], LabelRequest],
    first: int,
    count: int,
    on_close: Callable[[], None] = lambda: None,
    prepare: Callable[[TeacherSignals], Any] | None = None,
    on_taken: Callable[[int, str], None] | None = None,
) -> LabelFeed:
    """A feed of requests `first .. count-1` by one signal; what is taken is `LabelTensors` unless `prepare` makes something else."""
    return LabelFeed(
        session.service.source(session.info, spec, _connect(config, session)), request,
        first=first, count=count, max_bytes=config.feed.max_mb << 20, max_batches=config.feed.max_batches,
        prepare=prepare or partial(LabelTensors.of, pinned=torch.cuda.is_available()), on_close=on_close,
        burst=config.train.accumulation, on_taken=on_taken,
    )  # fmt: skip


class Requests(Protocol):
    """What is asked in a run; `training.windows.WindowSource` knows it."""

    @property
    def batches(self) -> int:
        """Micro-batches of the run."""

    def request(self, number: int) -> LabelRequest:
        """What is asked about micro-batch `number`; called by another thread, and may wait."""

    def close(self) -> None:
        """Wakes whoever waits in `request`."""


def open_training_feed(
    config: TrainConfig, session: TeacherSession, windows: Requests, provided: ProvidedRequests | None, first: int
) -> LabelFeed:
    """The feed of the training rows from micro-batch `first` on; `provided` hands over requests that cannot be made ahead."""
    lineage = session.service.lineage
    used = lineage.used if lineage is not None else None
    asked = (windows.request, windows.close) if provided is None else (provided.wait, provided.close)
    return open_any_feed(
        config, session, session.spec, asked[0], first, windows.batches, on_close=asked[1], on_taken=used
    )


class MicroBatch(Protocol):
    """What is learned from in one pass; `training.windows.MicroBatch` is one."""

    @property
    def examples(self) -> tuple[IndexedExample, ...]:
        """Its sequences."""

    @property
    def request(self) -> LabelRequest:
        """What a teacher that reads what the student reads is asked about all of them."""


class MicroBatches(Protocol):
    """What is learned from in a run; `training.windows.WindowSource` knows it."""

    @property
    def batches(self) -> int:
        """Micro-batches of the run."""

    def micro_batch(self, number: int) -> MicroBatch:
        """Micro-batch `number`; called by another thread, and may wait."""

    def close(self) -> None:
        """Wakes whoever waits in `micro_batch`."""


def open_joined_feed(
    config: TrainConfig,
    sessions: Sequence[TeacherSession],
    windows: MicroBatches,
    tell: Callable[[str], None],
    on_answer: Callable[[int, JoinedAnswer], None],
    first: int,
) -> JoinedFeed:
    """The one feed of all sessions, of the training rows from micro-batch `first` on.

    Args:
        tell: called with a sentence when a teacher is away, and when it is back.
        on_answer: called with the number of each micro-batch that is taken, and who has answered.
    """
    return JoinedFeed(
        [_asked_teacher(config, session) for session in sessions],
        lambda number: asked_of_all(sessions, windows.micro_batch(number)),
        first=first, count=windows.batches, max_bytes=config.feed.max_mb << 20, max_batches=config.feed.max_batches,
        prepare=partial(LabelTensors.of, pinned=torch.cuda.is_available()), tell=tell, burst=config.train.accumulation,
        on_close=windows.close, on_answer=on_answer,
    )  # fmt: skip


def asked_of_all(sessions: Sequence[TeacherSession], batch: MicroBatch) -> AskedAll:
    """What each teacher is asked about a micro-batch: about the sequences that it is responsible for, as it reads them."""
    examples = [item.example for item in batch.examples]
    by_name = {}
    for session in sessions:
        asked = session.asked(examples)
        if asked is None:
            continue
        fresh = frozenset(place for place, b in enumerate(asked.sequences) if b in batch.request.fresh)
        request = replace(asked.request, fresh=fresh)
        by_name[session.name] = AskedOne(asked.sequences, request, asked.row_M, asked.groups)
    return AskedAll(batch.request.names, by_name)


def _asked_teacher(config: TrainConfig, session: TeacherSession) -> AskedTeacher:
    source = session.service.source(session.info, session.spec, _connect(config, session))
    retry_s = session.connection.policy.retry_s
    return AskedTeacher(session.name, session.weight, session.when_missing, retry_s, source)


def _connect(config: TrainConfig, session: TeacherSession) -> Callable[[], TeacherClient] | None:
    """Makes the client of a teacher that is not waited for: it gives up soon, and what follows is its feed's to decide and to say."""
    if session.when_missing == "wait":
        return None
    away = session.connection.policy
    away = replace(away, retry_s=patience_s(session.when_missing, away.retry_s))
    connection = replace(session.connection, policy=away)
    return lambda: connection.client(partial(_said, session.name), config.feed.window_mb << 20)


def _said(name: str, problem: TeacherWireError) -> None:
    log.debug("teacher %s: %s; trying again", name, problem)
