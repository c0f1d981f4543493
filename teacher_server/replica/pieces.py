"""A request in the queue and in forward passes, whole or in pieces: where it may be cut, and how its answer comes together.

In: a call and the jobs that the queue makes of it; out: what each forward pass computes, and one answer in the call's order.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import numpy as np

from teacher_server.backends.base import ScoreJob
from teacher_server.replica.score_queue import Job
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.signals import TeacherSignals, Timing


@dataclass
class Waiting:
    """A request that is not answered yet.

    Attributes:
        queued_s: when it came.
        bounds: its pieces are the sequences [bounds[i], bounds[i + 1]).
        begun_s: when the first forward pass of it began, on the same clock; None before.
    """

    call: ScoreCall
    future: asyncio.Future[TeacherSignals]
    queued_s: float
    bounds: list[int]
    begun_s: float | None = None
    _answers: dict[int, tuple[Piece, TeacherSignals]] = field(default_factory=dict)

    def piece(self, job: Job) -> Piece:
        """What a job of the queue is to compute of this request."""
        stop = job.first + max(1, len(job.pieces))
        batch = self.call.batch
        if stop - job.first < len(self.bounds) - 1:
            batch = batch.select(range(self.bounds[job.first], self.bounds[stop]))
        return Piece(self, (batch, self.call.spec), job.first, stop)

    def take(self, piece: Piece, signals: TeacherSignals, fingerprint: str) -> bool:
        """Takes the answer to a piece; True if the request is answered with it."""
        if self.future.done():
            return False
        self._answers[piece.first] = (piece, signals)
        if sum(found.stop - found.first for found, _ in self._answers.values()) < len(self.bounds) - 1:
            return False
        parts = [self._answers[first][1] for first in sorted(self._answers)]
        times = [part.timing for part in parts]
        timing = Timing(
            queue_us=round(((self.begun_s or self.queued_s) - self.queued_s) * 1e6),
            forward_us=sum(time.forward_us for time in times),
            reduce_us=sum(time.reduce_us for time in times),
            batch_tokens=max(time.batch_tokens for time in times),
        )
        self.future.set_result(replace(TeacherSignals.join(parts), timing=timing, fingerprint=fingerprint))
        return True


@dataclass(frozen=True, eq=False)
class Piece:
    """Sequences of a request that go through one forward pass together: the pieces [first, stop) between its cuts."""

    waiting: Waiting
    job: ScoreJob
    first: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.job[0].tokens


def cuts(batch: TokenBatch) -> tuple[list[int], tuple[int, ...]]:
    """Where a batch may be cut so that every piece has a wanted row: bounds between sequences, and the tokens of each piece."""
    rows_B = batch.row_bounds_B1[1:] - batch.row_bounds_B1[:-1]
    bounds = np.append(np.flatnonzero(rows_B), batch.sequences)
    bounds[0] = 0
    return bounds.tolist(), tuple((batch.cu_lengths_B1[bounds[1:]] - batch.cu_lengths_B1[bounds[:-1]]).tolist())
