"""Labels ahead of the step that needs them: one source on the background loop; the bridge between steps and async code.

In: numbered requests, begun in order; out: `take(number)`, which waits and says how long. The host memory of labels is bounded: a request
is begun only when all that its answer will take while it is decoded, joined and copied fits into what is left (one always is); once it is
ready it counts as what it then takes. No more are begun than the teacher's time takes (`depth`). A failed request fails the step that needs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

from student_trainer.labels import event_loop
from student_trainer.labels.depth import Depth
from student_trainer.labels.rows_on_device import with_checked_rows
from student_trainer.labels.source import LabelRequest, Labels, LabelSource, LabelUsage
from teacher_wire.core.errors import CancelledRequestError, LimitError, TeacherWireError
from teacher_wire.core.signals import TeacherSignals


@dataclass
class FeedStats:
    """How long `take` has waited since the feed was made, in seconds."""

    wait_s: float = 0.0


@dataclass(frozen=True)
class Taken:
    """Labels that have been waited for, checked and made ready.

    Attributes:
        ready: what the feed's `prepare` made of them.
        usage: what they took.
        fingerprint: of the teacher that they are of.
    """

    ready: Any
    usage: LabelUsage
    fingerprint: str = ""


class LabelFeed:
    """Fetches labels of the requests `first .. count-1`, in order, ahead of `take`.

    Args:
        source: of the labels; closed with the feed.
        request: number -> what to ask; called in a thread of the feed, may wait.
        first, count: the range of numbers.
        max_bytes, max_batches: bounds on answers asked for and not yet taken; bytes of host memory, every copy counted.
        burst: micro-batches that are taken at once.
        prepare: makes of an answer what `take` gives, in a thread of the feed; the answer as it is if not given.
        on_close: wakes a `request` that is waiting.
        on_taken: called with number and fingerprint of labels that are taken.
    """

    def __init__(
        self,
        source: LabelSource,
        request: Callable[[int], LabelRequest],
        *,
        first: int,
        count: int,
        max_bytes: int,
        max_batches: int,
        prepare: Callable[[TeacherSignals], Any] = lambda signals: signals,
        burst: int = 1,
        on_close: Callable[[], None] = lambda: None,
        on_taken: Callable[[int, str], None] | None = None,
    ) -> None:
        self._source = source
        self._on_taken = on_taken
        self._request = request
        self._first = first
        self._count = count
        self._next = first
        self._max_bytes = max_bytes
        self._prepare = prepare
        self._on_close = on_close
        self.depth = Depth(max_batches, burst)
        self._taken_s: float | None = None
        self._promises: dict[int, Future[Taken]] = {}
        self._lock = threading.Condition()
        self._taken: set[int] = set()
        self._held: dict[int, int] = {}  # bytes of host memory by request
        self._closed = False
        self._error: BaseException | None = None
        self.stats = FeedStats()
        self._work = event_loop.start(self._run())

    def take(self, number: int) -> Taken:
        """The checked labels of request `number`; each can be taken once.

        Raises:
            TeacherWireError: the request failed, or its answer was refused; or the feed is closed.
            ValueError: there is no such request, or it has been taken.
        """
        if not self._first <= number < self._count:
            raise ValueError(f"there is no request {number}: the feed has {self._first}..{self._count - 1}")
        started = time.perf_counter()
        if self._taken_s is not None:
            self.depth.taken(started - self._taken_s)
        with self._lock:
            if (
                self._closed
            ):  # also where the answer is there already: what a closed feed gives does not depend on its speed
                raise self._error or CancelledRequestError("the feed was closed")
            while number not in self._promises:
                if number in self._taken:
                    raise ValueError(f"request {number} has been taken: each can be taken once")
                if self._error is not None:
                    raise self._error
                if self._closed:
                    raise CancelledRequestError("the feed was closed")
                self._lock.wait()
            promise = self._promises[number]
            self._taken.add(number)
        try:
            labels = promise.result()
        except (CancelledRequestError, CancelledError):
            raise (
                self._error or CancelledRequestError("the feed was closed")
            ) from None  # it ended for a reason: say that one
        finally:
            self._taken_s = time.perf_counter()
            self.stats.wait_s += self._taken_s - started
            with self._lock:
                self._promises.pop(number, None)
                self._held.pop(number, None)
                self._lock.notify_all()
        if self._on_taken is not None:
            self._on_taken(number, labels.fingerprint)
        return labels

    def close(self) -> None:
        """Ends; open requests are taken back."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._on_close()
        with contextlib.suppress(Exception):  # whoever needed an answer has been told
            self._work.result(timeout=30)

    async def _run(self) -> None:
        try:
            await self._feed()
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
                self._lock.notify_all()
            raise

    async def _feed(self) -> None:
        tasks: set[asyncio.Task[None]] = set()
        async with self._source, _remembered(self):
            while self._next < self._count and not self._closed:
                number = self._next
                request = await asyncio.get_running_loop().run_in_executor(None, self._request, number)
                size = self._source.peak_bytes(request)
                if not await asyncio.get_running_loop().run_in_executor(None, self._wait_for_room, size):
                    break
                with self._lock:
                    self._held[number] = size
                    self._promises[number] = Future()
                    self._lock.notify_all()
                self._next += 1
                task = asyncio.create_task(self._fetch(number, request))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.get_running_loop().run_in_executor(None, self._wait_for_end)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(self, number: int, request: LabelRequest) -> None:
        promise = self._promises[number]
        asked_s = time.perf_counter()
        try:
            ready = await asyncio.to_thread(self._ready, await self._source.labels(request), request)
            with self._lock:
                self.depth.answered(time.perf_counter() - asked_s)
                if number in self._held:
                    self._held[number] = _bytes_of(ready.ready)
                self._lock.notify_all()
            promise.set_result(ready)
        except asyncio.CancelledError:
            promise.cancel()
            raise
        except Exception as error:
            promise.set_exception(_with_names(error, request))

    def _ready(self, labels: Labels, request: LabelRequest) -> Taken:
        signals = labels.signals  # not held longer than it takes: they may be as large as what is made of them
        return Taken(self._prepare(with_checked_rows(signals, request.batch)), labels.usage, signals.fingerprint)

    def _wait_for_room(self, size: int) -> bool:
        """Blocks until `size` more bytes may be under way; False when the feed is closed."""
        with self._lock:
            while not self._closed and self._held:
                if len(self._held) < self.depth.batches and sum(self._held.values()) + size <= self._max_bytes:
                    break
                self._lock.wait()
            return not self._closed

    def _wait_for_end(self) -> None:
        """Blocks until everything asked for is taken, or the feed is closed."""
        with self._lock:
            while self._promises and not self._closed:
                self._lock.wait()


def _bytes_of(ready: Any) -> int:
    """What an answer takes once it is ready."""
    if isinstance(ready, TeacherSignals):
        return sum(tensor.array.nbytes for tensor in ready.tensors.values())
    return int(getattr(ready, "nbytes", 0))


@contextlib.asynccontextmanager
async def _remembered(feed: LabelFeed) -> AsyncIterator[None]:
    """Keeps what ends the feed before the source is closed and fails everything under way with a lesser word."""
    try:
        yield
    except BaseException as error:
        feed._error = error
        raise


def _with_names(error: Exception, request: LabelRequest) -> Exception:
    """Says of a refused request which samples it held."""
    if isinstance(error, TeacherWireError) and not isinstance(error, LimitError):
        error.add_note(f"samples: {', '.join(request.names[:4])}{', …' if len(request.names) > 4 else ''}")
    return error
