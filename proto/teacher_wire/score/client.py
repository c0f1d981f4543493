"""The student's half of a Score stream: many requests on one stream, which is opened again and taken up when it breaks.

In: `TokenBatch` and `SignalSpec`; out: `TeacherSignals`, checked for shape and origin. It retries what is retryable for a stated
time and never gives half an answer or one from another teacher.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from teacher_wire import PROTOCOL
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import Cache, Latency, ScoreCall
from teacher_wire.core.errors import (
    CancelledRequestError,
    DeadlineError,
    LabelError,
    LimitError,
    OverloadedError,
    ServerError,
    TeacherWireError,
    UnavailableError,
)
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.score import codec
from teacher_wire.score.assembly import Assembly
from teacher_wire.transport import status_table
from teacher_wire.transport.connection import Connection
from teacher_wire.transport.pacing import Pace
from teacher_wire.transport.retry import silent
from teacher_wire.v2 import teacher_pb2 as pb

log = logging.getLogger(__name__)

_PATIENCE = 1.1  # times the deadline, until a server that says nothing is left


@dataclass
class _Pending:
    """A request that is not answered yet, with the chunks that have come; `number` says how old it is."""

    number: int
    call: ScoreCall
    info: TeacherInfo
    future: asyncio.Future[TeacherSignals]
    answer: Assembly
    failing_since: float = math.inf  # of the clock; infinite while all goes well
    reply_id: int = 0
    resumed_at: int = 0
    heard_s: float = math.inf  # when it was sent, or a chunk of it came; infinite while it waits to be sent
    deadline_is_ours: bool = False

    def messages(self) -> Iterator[pb.ScoreUp]:
        request = codec.encode_call(self.call)
        self.resumed_at = self.answer.chunks
        if self.resumed_at:
            request.resume.CopyFrom(pb.Resume(reply_id=self.reply_id, next_chunk=self.resumed_at))
        return codec.request_messages(request)


class ScoreClient:
    """The requests of one client; see `endpoint.client.TeacherClient` for the arguments."""

    def __init__(
        self,
        connection: Connection,
        *,
        window_bytes: int,
        retry_for_s: float,
        on_trouble: Callable[[TeacherWireError], None],
        answer_s: float,
    ) -> None:
        self._connection = connection
        self._window_bytes = window_bytes
        self._retry_for_s = retry_for_s
        self._on_trouble = on_trouble
        self._answer_s = answer_s
        self._pending: dict[str, _Pending] = {}
        self._up: asyncio.Queue[pb.ScoreUp] = asyncio.Queue()
        self._stream: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self._backlog: list[
            tuple[bool, int, str]
        ] = []  # to be sent, interactive ones first, and of each the oldest first
        self._pace = Pace()
        self._pump_timer: asyncio.TimerHandle | None = None
        self._delayed: set[asyncio.Task[None]] = set()
        self._answered_s = -math.inf  # when the server last answered anything
        self._closed = False

    @property
    def open_requests(self) -> int:
        """Requests that are not answered yet."""
        return len(self._pending)

    async def close(self) -> None:
        """Ends the stream; unanswered requests fail with CancelledRequestError."""
        self._closed = True
        if self._pump_timer is not None:
            self._pump_timer.cancel()
        for task in (self._stream, *self._delayed):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        self._fail_all(CancelledRequestError("the client was closed"))

    async def score(
        self,
        info: TeacherInfo,
        spec: SignalSpec,
        batch: TokenBatch,
        *,
        timeout_s: float = 0.0,
        cache: Cache = "shared",
        latency: Latency = "bulk",
    ) -> TeacherSignals:
        """See `TeacherClient.score`."""
        if self._closed:
            raise CancelledRequestError("the client was closed")
        ours = not timeout_s and self._answer_s < math.inf
        limit_s = self._answer_s if ours else timeout_s
        call = ScoreCall(
            uuid.uuid4().hex, info.name, info.fingerprint, spec, batch, limit_s, cache=cache, latency=latency
        )
        needed = codec.check_call(call, info)
        if needed > self._window_bytes:
            raise LimitError(
                "the reply is larger than the client's window",
                field="window_bytes",
                value=needed,
                limit=self._window_bytes,
            )
        future = asyncio.get_running_loop().create_future()
        pending = _Pending(next(self._numbers), call, info, future, Assembly(call, info), deadline_is_ours=ours)
        self._pending[call.request_id] = pending
        self._connection.stats.requests += 1
        if self._stream is None or self._stream.done():
            self._stream = asyncio.create_task(self._keep_stream())
        else:
            self._send(pending)
        try:
            return await pending.future
        except asyncio.CancelledError:
            self._up.put_nowait(pb.ScoreUp(cancel=pb.Cancel(request_id=call.request_id)))
            raise
        finally:
            self._pending.pop(call.request_id, None)
            self._pace.ended(call.request_id)
            self._pump()

    async def _keep_stream(self) -> None:
        """Holds one stream open while requests are pending, and opens the next when it breaks."""
        while not self._closed:
            try:
                await self._run_stream()
                problem: TeacherWireError = UnavailableError(f"{self._connection.address}: the server ended the stream")
            except grpc.RpcError as error:
                problem = self._connection.problem(error)
            except TeacherWireError as error:
                problem = error
            except Exception as error:  # nobody may wait for ever because of a fault of ours
                log.exception("the stream to %s failed", self._connection.address)
                problem = ServerError(f"{type(error).__name__}: {error}")
            if not isinstance(problem, status_table.RETRYABLE):
                self._fail_all(problem)
                return
            self._fail_overdue(problem)
            if not self._pending:
                return
            self._connection.stats.reconnects += 1
            self._on_trouble(problem)
            await self._connection.next_edge()
            await asyncio.sleep(self._connection.pause_s(problem))

    async def _run_stream(self) -> None:
        for task in self._delayed:  # everything pending is sent again right now
            task.cancel()
        self._up = asyncio.Queue()
        self._up.put_nowait(pb.ScoreUp(open=pb.Open(protocol=PROTOCOL, window_bytes=self._window_bytes)))
        self._pace.lost()
        self._backlog = []
        for pending in list(self._pending.values()):
            pending.heard_s = math.inf
            self._send(pending)
        call = self._connection.stub.Score(metadata=self._connection.metadata)
        writer = asyncio.create_task(self._write(call))
        watch = asyncio.create_task(self._watch(call))
        try:
            async for down in call:
                self._take(down)
        except asyncio.CancelledError:
            if not watch.done():
                raise
        finally:
            writer.cancel()
            watch.cancel()
            call.cancel()
        if watch.done() and not watch.cancelled():
            raise silent(self._connection.address, self._answer_s)

    async def _watch(self, call: grpc.aio.StreamStreamCall[pb.ScoreUp, pb.ScoreDown]) -> None:
        """Breaks the stream when a request has been with the server for too long without a part of its answer."""
        if self._answer_s == math.inf:
            await asyncio.Event().wait()
        patience_s = self._answer_s * _PATIENCE  # the server may say first that the deadline has passed
        while True:
            oldest_s = min((pending.heard_s for pending in self._pending.values()), default=math.inf)
            left_s = min(oldest_s, time.monotonic()) + patience_s - time.monotonic()
            if left_s <= 0:
                break
            await asyncio.sleep(left_s)
        call.cancel()

    async def _write(self, call: grpc.aio.StreamStreamCall[pb.ScoreUp, pb.ScoreDown]) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # the reading side reports it
            while True:
                await call.write(await self._up.get())

    def _take(self, down: pb.ScoreDown) -> None:
        kind = down.WhichOneof("message")
        if kind == "chunk":
            payload = self._take_chunk(down.chunk)
            self._connection.stats.payload_bytes += payload
            self._up.put_nowait(pb.ScoreUp(credit=pb.Credit(bytes=payload)))
        elif kind == "done":
            self._take_done(down.done)
        elif kind == "failed":
            self._take_failed(down.failed)

    def _take_chunk(self, chunk: pb.ScoreChunk) -> int:
        """Writes a chunk into its answer; its payload bytes, which are given back even if nobody wants it."""
        pending = self._pending.get(chunk.request_id)
        if pending is None:  # taken back by us while it was on its way
            return codec.payload_bytes(chunk)
        pending.failing_since = math.inf
        pending.heard_s = time.monotonic()
        if pending.reply_id != chunk.reply_id:
            pending.reply_id = chunk.reply_id
            pending.answer = Assembly(pending.call, pending.info)
        elif chunk.index == pending.answer.chunks == pending.resumed_at != 0:
            self._connection.stats.resumed_chunks += chunk.index
        try:
            return codec.decode_chunk(chunk, pending.answer)
        except LabelError as error:
            self._resolve(pending, error)
            return codec.payload_bytes(chunk)

    def _take_done(self, done: pb.ScoreDone) -> None:
        pending = self._pending.get(done.request_id)
        if pending is None:
            return
        self._up.put_nowait(pb.ScoreUp(ack=pb.Ack(request_id=done.request_id)))
        self._answered_s = time.monotonic()
        self._pace.answered(done.request_id)
        try:
            self._resolve(pending, codec.finish_reply(pending.answer, done, pending.call))
            self._connection.stats.replies += 1
        except LabelError as error:
            self._resolve(pending, error)

    def _take_failed(self, failed: pb.ScoreFailed) -> None:
        pending = self._pending.get(failed.request_id)
        if pending is None:
            return
        problem = status_table.from_detail(failed.error)
        pause = self._connection.pause_s(problem)
        self._pace.ended(failed.request_id)
        pending.heard_s = math.inf
        may_retry = isinstance(
            problem, (*status_table.RETRYABLE, *((DeadlineError,) if pending.deadline_is_ours else ()))
        )
        if not may_retry or self._is_overdue(pending, problem, pause):
            self._resolve(pending, problem)
            return
        self._connection.stats.retries += 1
        self._on_trouble(problem)
        if isinstance(problem, OverloadedError):
            self._pace.refused(failed.request_id, time.monotonic(), pause)
            self._send(pending)
        else:
            task = asyncio.create_task(self._send_later(pending, pause))
            self._delayed.add(task)
            task.add_done_callback(self._delayed.discard)

    async def _send_later(self, pending: _Pending, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        self._send(pending)

    def _send(self, pending: _Pending) -> None:
        heapq.heappush(self._backlog, (not pending.call.interactive, pending.number, pending.call.request_id))
        self._pump()

    def _pump(self) -> None:
        """Sends as many of the waiting requests as the pace allows, interactive ones first, and of each the oldest first."""
        if self._pump_timer is not None:
            self._pump_timer.cancel()
            self._pump_timer = None
        while self._backlog:
            request_id = self._backlog[0][2]
            pending = self._pending.get(request_id)
            wait_s = self._pace.wait_s(time.monotonic()) if pending is not None else 0.0
            if wait_s > 0:
                if wait_s < math.inf and not self._closed:
                    self._pump_timer = asyncio.get_running_loop().call_later(wait_s, self._pump)
                return
            heapq.heappop(self._backlog)
            if pending is not None:
                self._pace.sent(request_id)
                pending.heard_s = time.monotonic()
                for up in pending.messages():
                    self._up.put_nowait(up)

    def _resolve(self, pending: _Pending, outcome: TeacherSignals | TeacherWireError) -> None:
        self._pending.pop(pending.call.request_id, None)
        if pending.future.done():
            return
        if isinstance(outcome, TeacherWireError):
            pending.future.set_exception(outcome)
        else:
            pending.future.set_result(outcome)

    def _fail_all(self, error: TeacherWireError) -> None:
        for pending in list(self._pending.values()):
            self._resolve(pending, error)

    def _fail_overdue(self, error: TeacherWireError) -> None:
        for pending in list(self._pending.values()):
            if self._is_overdue(pending, error):
                self._resolve(pending, error)

    def _is_overdue(self, pending: _Pending, problem: TeacherWireError, pause_s: float = 0.0) -> bool:
        """Whether it has failed for longer than we try; the clock starts with the first failure since anything came.

        A server that refuses some requests for being full and answers others is no failure, however long it takes.
        """
        now = time.monotonic()
        pending.failing_since = min(pending.failing_since, now)
        since = pending.failing_since
        if isinstance(problem, OverloadedError):
            since = max(since, self._answered_s)
        return now + pause_s - since >= self._retry_for_s
