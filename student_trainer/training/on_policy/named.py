"""Requests that name the student's own likeliest ids, made ahead where every sequence is a rollout: the ids of its sampling are there.

In: windows with rollouts, and what the trainer hands over; out: requests for the feed. A micro-batch that holds a row of the data waits for
the trainer, whose weights of that step decide which ids are named.
"""

from __future__ import annotations

from dataclasses import replace

from student_trainer.labels.late_requests import ProvidedRequests
from student_trainer.labels.source import LabelRequest
from student_trainer.training.on_policy.windows import RolloutWindows
from student_trainer.training.windows import MicroBatch, likeliest_ids


class NamedAhead:
    """`teachers.feeds.Requests`; see module."""

    def __init__(self, windows: RolloutWindows) -> None:
        self._windows = windows
        self._provided = ProvidedRequests()

    @property
    def batches(self) -> int:
        """Micro-batches of the run."""
        return self._windows.batches

    def put(self, number: int, request: LabelRequest) -> None:
        """What the trainer asks about micro-batch `number`, if that was not asked ahead."""
        if len(request.fresh) < len(request.names):
            self._provided.put(number, request)

    def request(self, number: int) -> LabelRequest:
        """What is asked about micro-batch `number`; waits until it is written, or handed over.

        Raises:
            CancelledRequestError: nothing more will come.
        """
        batch = self._windows.micro_batch(number)
        named = _named(batch)
        return self._provided.wait(number) if named is None else named

    def close(self) -> None:
        """Wakes whoever waits in `request`."""
        self._windows.close()
        self._provided.close()


def _named(batch: MicroBatch) -> LabelRequest | None:
    """The request with the ids of sampling; None if a sequence has none."""
    if len(batch.request.fresh) < len(batch.examples):
        return None
    ids_NM = likeliest_ids(batch.examples)
    assert ids_NM is not None, "the engine was asked for the ids"
    return replace(batch.request, batch=replace(batch.request.batch, extra_ids_NM=ids_NM))
