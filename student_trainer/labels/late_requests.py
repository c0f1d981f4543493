"""Requests that cannot be made ahead: the trainer hands them over, the feed's thread waits for them.

For labels that name the student's own likeliest ids, which only exist once the student has seen the batch.
"""

from __future__ import annotations

import threading

from student_trainer.labels.source import LabelRequest
from teacher_wire.core.errors import CancelledRequestError


class ProvidedRequests:
    """A mailbox by number; `close` wakes whoever waits."""

    def __init__(self) -> None:
        self._requests: dict[int, LabelRequest] = {}
        self._changed = threading.Condition()
        self._closed = False

    def put(self, number: int, request: LabelRequest) -> None:
        """Hands over request `number`."""
        with self._changed:
            self._requests[number] = request
            self._changed.notify_all()

    def wait(self, number: int) -> LabelRequest:
        """Request `number`, when it is there.

        Raises:
            CancelledRequestError: the mailbox was closed.
        """
        with self._changed:
            while number not in self._requests:
                if self._closed:
                    raise CancelledRequestError("the feed was closed")
                self._changed.wait()
            return self._requests.pop(number)

    def close(self) -> None:
        """No more requests will come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
