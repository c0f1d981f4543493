"""Feeds of labels from the sessions of a run: one per session and signal, each ahead of the steps that need it.

In: a session and numbered requests; out: a `LabelFeed` within the bounds of the section `feed`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from student_trainer.config.run import TrainConfig
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.late_requests import ProvidedRequests
from student_trainer.labels.prefetch import LabelFeed
from student_trainer.labels.source import LabelRequest
from student_trainer.teachers.session import TeacherSession
from teacher_wire.core.signals import SignalSpec, TeacherSignals


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
        session.service.source(session.info, spec), request,
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
