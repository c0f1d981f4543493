"""Labels ahead of the step that needs them, on the background loop; the bridge between steps and async code.

In: numbered requests, begun in order; out: `take(number)`, which waits and says how long. The host memory of labels is bounded: a request
is begun only when all that its answer will take while it is decoded, joined and copied fits into what is left (one always is); once it is
ready it counts as what it then takes. No more are begun than the teacher's time takes (`depth`). A failed request fails the step that needs it.
`AheadFeed` bounds and orders; whom it asks is its subclasses' business: `LabelFeed` one teacher, `joined.feed.JoinedFeed` several. While a feed
waits for room it holds no thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from student_trainer.interruption import guarded, patiently
from student_trainer.labels import event_loop
from student_trainer.labels.depth import Depth
from student_trainer.labels.rows_on_device import with_checked_rows
from student_trainer.labels.source import LabelRequest, Labels, LabelSource, LabelUsage
from teacher_wire.core.errors import CancelledRequestError, LimitError, TeacherWireError
from teacher_wire.core.signals import TeacherSignals

Asked = TypeVar("Asked")


@dataclass
class FeedStats:
    """How long `take` has waited since the feed was made, in seconds.

    Attributes:
        wait_s: in all.
        alone_s: of several teachers for each alone, after all others had answered.
    """

    wait_s: float = 0.0
    alone_s: dict[str, float] = field(default_factory=dict)


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


class AheadFeed(Generic[Asked]):
    """Fetches what is asked by the numbers `first .. count-1`, in order, ahead of `take`; begins when `_begin` is called.

    Args:
        ask: number -> what to ask; called in a thread of the loop, may wait.
        first, count: the range of numbers.
        max_bytes, max_batches: bounds on answers asked for and not yet taken; bytes of host memory, every copy counted.
        burst: micro-batches that are taken at once.
        on_close: wakes an `ask` that is waiting.
    """

    def __init__(
        self,
        ask: Callable[[int], Asked],
        *,
        first: int,
        count: int,
        max_bytes: int,
        max_batches: int,
        burst: int = 1,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._ask = ask
        self._first = first
        self._count = count
        self._next = first
        self._max_bytes = max_bytes
        self._on_close = on_close
        self.depth = Depth(max_batches, burst)
        self._taken_s: float | None = None
        self._promises: dict[int, Future[Taken]] = {}
        self._lock = threading.Condition()
        self._changed = asyncio.Event()  # for whoever waits on the loop, as `_lock` is for threads
        self._taken: set[int] = set()
        self._held: dict[int, int] = {}  # bytes of host memory by request
        self._closed = False
        self._error: BaseException | None = None
        self.stats = FeedStats()

    def _begin(self) -> None:
        self._work = event_loop.start(self._run())

    def _sources(self) -> contextlib.AbstractAsyncContextManager[object]:
        """What is open while the feed is."""
        raise NotImplementedError

    def _peak_bytes(self, asked: Asked) -> int:
        """Host memory that the answer takes at most on its way."""
        raise NotImplementedError

    async def _fetched(self, asked: Asked) -> Taken:
        """The answer, checked and made ready."""
        raise NotImplementedError

    def _named(self, error: Exception, asked: Asked) -> Exception:
        """What is raised where the answer is taken."""
        return error

    def _on_take(self, number: int, taken: Taken, began_s: float) -> None:
        """The answer has been taken; it was waited for since `began_s`, of the clock `time.perf_counter`."""

    @guarded()
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
                patiently(partial(self._lock.wait_for, partial(self._is_decided, number)))
            promise = self._promises[number]
            self._taken.add(number)
        try:
            event_loop.wait_for(promise)
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
                self._tell_all()
        self._on_take(number, labels, started)
        return labels

    def _is_decided(self, number: int) -> bool:
        """Whether request `number` is under way, or will never be."""
        return number in self._promises or number in self._taken or self._closed or self._error is not None

    @guarded()
    def close(self) -> None:
        """Ends; open requests are taken back."""
        with self._lock:
            self._closed = True
            self._tell_all()
        self._on_close()
        event_loop.wait_for(self._work, limit_s=30)  # whoever needed an answer has been told

    def _tell_all(self) -> None:
        """Wakes whoever waits for a change; holds `_lock`."""
        self._lock.notify_all()
        event_loop.loop().call_soon_threadsafe(self._changed.set)

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
        async with self._sources(), _remembered(self):
            while self._next < self._count and not self._closed:
                number = self._next
                asked = await asyncio.get_running_loop().run_in_executor(None, self._ask, number)
                size = self._peak_bytes(asked)
                if not await self._until(lambda size=size: self._has_room(size)):  # type: ignore[misc]
                    break
                with self._lock:
                    self._held[number] = size
                    self._promises[number] = Future()
                    self._lock.notify_all()
                self._next += 1
                task = asyncio.create_task(self._fetch(number, asked))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await self._until(lambda: not self._promises)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(self, number: int, asked: Asked) -> None:
        promise = self._promises[number]
        asked_s = time.perf_counter()
        try:
            ready = await self._fetched(asked)
            with self._lock:
                self.depth.answered(time.perf_counter() - asked_s)
                if number in self._held:
                    self._held[number] = _bytes_of(ready.ready)
                self._tell_all()
            promise.set_result(ready)
        except asyncio.CancelledError:
            promise.cancel()
            raise
        except Exception as error:
            promise.set_exception(self._named(error, asked))

    async def _until(self, is_so: Callable[[], bool]) -> bool:
        """Waits until `is_so` under the lock; False when the feed is closed."""
        while True:
            self._changed.clear()
            with self._lock:
                if self._closed:
                    return False
                if is_so():
                    return True
            await self._changed.wait()

    def _has_room(self, size: int) -> bool:
        """Whether `size` more bytes may be under way."""
        held = self._held
        return not held or (len(held) < self.depth.batches and sum(held.values()) + size <= self._max_bytes)


class LabelFeed(AheadFeed[LabelRequest]):
    """Fetches labels of one teacher; the other arguments are those of `AheadFeed`.

    Args:
        source: of the labels; closed with the feed.
        request: number -> what to ask.
        prepare: makes of an answer what `take` gives, in a thread of the feed; the answer as it is if not given.
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
        super().__init__(
            request, first=first, count=count, max_bytes=max_bytes, max_batches=max_batches, burst=burst,
            on_close=on_close,
        )  # fmt: skip
        self._source = source
        self._prepare = prepare
        self._on_taken = on_taken
        self._begin()

    def _sources(self) -> contextlib.AbstractAsyncContextManager[object]:
        return self._source

    def _peak_bytes(self, asked: LabelRequest) -> int:
        return self._source.peak_bytes(asked)

    async def _fetched(self, asked: LabelRequest) -> Taken:
        return await asyncio.to_thread(made_ready, await self._source.labels(asked), asked, self._prepare)

    def _named(self, error: Exception, asked: LabelRequest) -> Exception:
        return with_names(error, asked)

    def _on_take(self, number: int, taken: Taken, began_s: float) -> None:
        if self._on_taken is not None:
            self._on_taken(number, taken.fingerprint)


def made_ready(labels: Labels, request: LabelRequest, prepare: Callable[[TeacherSignals], Any]) -> Taken:
    """An answer as its steps read it."""
    signals = labels.signals  # not held longer than it takes: they may be as large as what is made of them
    return Taken(prepare(with_checked_rows(signals, request.batch)), labels.usage, signals.fingerprint)


def _bytes_of(ready: Any) -> int:
    """What an answer takes once it is ready."""
    if isinstance(ready, TeacherSignals):
        return sum(tensor.array.nbytes for tensor in ready.tensors.values())
    return int(getattr(ready, "nbytes", 0))


@contextlib.asynccontextmanager
async def _remembered(feed: AheadFeed[Any]) -> AsyncIterator[None]:
    """Keeps what ends the feed before the source is closed and fails everything under way with a lesser word."""
    try:
        yield
    except BaseException as error:
        feed._error = error
        raise


def with_names(error: Exception, request: LabelRequest) -> Exception:
    """Says of a refused request which samples it held."""
    if isinstance(error, TeacherWireError) and not isinstance(error, LimitError):
        error.add_note(f"samples: {', '.join(request.names[:4])}{', …' if len(request.names) > 4 else ''}")
    return error
