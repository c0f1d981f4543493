"""The student's half of the contract: one stream, many requests, reconnecting and resuming by itself.

In: `TokenBatch` and `SignalSpec`; out: `TeacherSignals`, checked for shape and origin. It retries
what is retryable for a stated time and never returns half an answer or one from another teacher.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import math
import random
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, replace

import grpc

from teacher_wire import PROTOCOL
from teacher_wire.artifacts import client as artifacts
from teacher_wire.artifacts.messages import Artifact
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import (
    CancelledRequestError,
    DeadlineError,
    LabelError,
    LimitError,
    NotFoundError,
    OverloadedError,
    ServerError,
    TeacherWireError,
    UnavailableError,
)
from teacher_wire.core.info import ArtifactInfo, TeacherInfo
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.core.status import ServerStatus
from teacher_wire.endpoint import status_codec
from teacher_wire.generate import client
from teacher_wire.generate.messages import GenerateCall, PromptBatch, Sample, SamplingSpec
from teacher_wire.score import codec
from teacher_wire.score.assembly import Assembly
from teacher_wire.transport import status_table, versions
from teacher_wire.transport.channel import Credentials, addresses_of, call_metadata, open_channel
from teacher_wire.transport.pacing import Pace
from teacher_wire.transport.proxy import AUTO, route_to
from teacher_wire.transport.retry import Retry, silent
from teacher_wire.v2 import teacher_pb2 as pb
from teacher_wire.v2 import teacher_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

DEFAULT_WINDOW_BYTES = 64 << 20
BACKOFF_S = (1.0, 2.0)
_PATIENCE = 1.1  # times the deadline, until a server that says nothing is left


@dataclass
class ClientStats:
    """Counters of one client since it was made."""

    requests: int = 0
    replies: int = 0
    payload_bytes: int = 0
    reconnects: int = 0
    retries: int = 0
    resumed_chunks: int = 0


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


class TeacherClient:
    """An async client of one server; use it as an async context manager, in one event loop.

    Args:
        address: HOST:PORT, or several with commas: when one edge is gone the next is tried.
        credentials: TLS files, token, tenant.
        window_bytes: reply bytes the server may have under way to us.
        retry_for_s: how long a request is retried while the server is unreachable or overloaded.
        backoff_s: shortest and longest pause before the next try.
        on_trouble: told about every retry, for progress displays.
        answer_s: how long a call that the server has taken may stay without any part of its answer before it is made again; it is
            told to the server as the deadline of calls that have none. Infinite for ever.

    Raises:
        RequestError: from the constructor, if the address is none or a file cannot be read.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: Credentials | None = None,
        window_bytes: int = DEFAULT_WINDOW_BYTES,
        retry_for_s: float = 300.0,
        backoff_s: tuple[float, float] = BACKOFF_S,
        on_trouble: Callable[[TeacherWireError], None] | None = None,
        answer_s: float = math.inf,
    ) -> None:
        self.address = address
        self._answer_s = answer_s
        self.stats = ClientStats()
        self._window_bytes = window_bytes
        self._retry_for_s = retry_for_s
        self._backoff_s = backoff_s
        self._on_trouble = on_trouble or (lambda error: log.warning("%s; trying again", error))
        self._credentials = credentials
        self._addresses = deque(addresses_of(address))
        self._channel = self._open()
        self._metadata = call_metadata(credentials)
        self._stub = pb_grpc.TeacherStub(self._channel)
        self._pending: dict[str, _Pending] = {}
        self._up: asyncio.Queue[pb.ScoreUp] = asyncio.Queue()
        self._stream: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self._backlog: list[tuple[int, str]] = []  # to be sent, oldest first
        self._pace = Pace()
        self._pump_timer: asyncio.TimerHandle | None = None
        self._delayed: set[asyncio.Task[None]] = set()
        self._answered_s = -math.inf  # when the server last answered anything
        self._closed = False

    async def __aenter__(self) -> TeacherClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

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
        await self._channel.close()

    def _open(self) -> grpc.aio.Channel:
        address, setting = self._addresses[0], self._credentials.proxy if self._credentials else AUTO
        self._route = str(route_to(address, setting))
        return open_channel(address, self._credentials)

    def _problem(self, error: grpc.RpcError) -> TeacherWireError:
        return status_table.from_rpc(error, self.address, self._route)

    # ------------------------------------------------------------ unary calls

    async def describe(self, timeout_s: float = 10.0, wait_for_s: float = 0.0) -> list[TeacherInfo]:
        """Every teacher behind the address.

        Args:
            timeout_s: of one try.
            wait_for_s: how long to keep trying while nobody answers.

        Raises:
            UnavailableError: nobody answers.
            CapabilityError: another version of the contract, or no teacher server at all.
        """
        give_up_at = time.monotonic() + wait_for_s
        tried = 0
        while True:
            try:
                reply = await self._stub.Describe(
                    pb.DescribeRequest(), timeout=timeout_s, metadata=self._metadata, wait_for_ready=False
                )
                return codec.decode_description(reply)
            except grpc.RpcError as error:
                problem = self._problem(error)
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    theirs = await versions.of_older_server(self._channel, self._metadata, timeout_s)
                    problem = versions.difference(PROTOCOL, theirs, self.address) if theirs else problem
                if not isinstance(problem, status_table.RETRYABLE):
                    raise problem from None
                await self._next_edge()
                tried += 1
                if tried < len(self._addresses):
                    continue
                if time.monotonic() >= give_up_at:
                    raise problem from None
                await asyncio.sleep(self._pause(problem))

    async def teacher(self, name: str = "", wait_for_s: float = 0.0) -> TeacherInfo:
        """The teacher of that name; the empty name means the only one.

        Raises:
            NotFoundError: no such teacher, or several and no name.
        """
        teachers = {info.name: info for info in await self.describe(wait_for_s=wait_for_s)}
        if not name and len(teachers) == 1:
            return next(iter(teachers.values()))
        if name not in teachers:
            raise NotFoundError(
                f"no teacher of that name at {self.address}",
                field="teacher.name", value=name or "(none given)", limit="|".join(sorted(teachers)),
            )  # fmt: skip
        return teachers[name]

    async def server_status(self, timeout_s: float = 10.0) -> ServerStatus:
        """How the server is doing; of tenants, only the caller's own unless it is an operator.

        Raises:
            CapabilityError: it keeps no status.
            UnavailableError: nobody answers.
        """
        try:
            reply = await self._stub.Status(pb.StatusRequest(), timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._problem(error) from None
        return status_codec.decode_status(reply)

    async def artifact(
        self,
        info: TeacherInfo,
        wanted: ArtifactInfo,
        progress: Callable[[int, int], None] | None = None,
        *,
        timeout_s: float = 0.0,
    ) -> Artifact:
        """An artifact of a teacher, its digest checked. A call that breaks is taken up where it was.

        Args:
            info: whose.
            wanted: one of `info.artifacts`.
            progress: called with bytes received and bytes in all.
            timeout_s: of one call; 0 for none.

        Raises:
            LabelError: what came is not what was described.
            CapabilityError: this teacher, or this side, has no artifacts of that kind.
            UnavailableError, OverloadedError: nothing came for `retry_for_s`.
        """
        retry = replace(self._retry(), next_edge=self._next_edge)
        return await artifacts.fetch(lambda: self._stub, self._metadata, info, wanted, retry, progress, timeout_s)

    def _retry(self) -> Retry:
        return Retry(
            self.address, self._retry_for_s, self._pause, self._on_trouble, self.stats, self._route, self._answer_s
        )

    # ----------------------------------------------------------------- labels

    async def score(
        self, info: TeacherInfo, spec: SignalSpec, batch: TokenBatch, *, timeout_s: float = 0.0
    ) -> TeacherSignals:
        """The teacher's labels for the wanted rows of `batch`.

        Args:
            info: the teacher, as `describe` gave it; its fingerprint is part of the request.
            spec: which signal.
            batch: which tokens and rows.
            timeout_s: after which the request has failed and the server may drop it; 0 for `answer_s`, after which it is asked again.

        Raises:
            RequestError, LimitError: `batch` breaks a limit; checked before anything is sent.
            LabelError: an answer that must not be learned from.
            MismatchError: the teacher behind the address is another one now.
            UnavailableError: nobody answered for `retry_for_s`.
        """
        if self._closed:
            raise CancelledRequestError("the client was closed")
        ours = not timeout_s and self._answer_s < math.inf
        call = ScoreCall(
            uuid.uuid4().hex, info.name, info.fingerprint, spec, batch, self._answer_s if ours else timeout_s
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
        self.stats.requests += 1
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

    def generate(
        self, info: TeacherInfo, spec: SamplingSpec, prompts: PromptBatch, *, timeout_s: float = 0.0
    ) -> AsyncGenerator[Sample, None]:
        """Samples of every prompt in the order in which they finish, none twice; close it (`aclose`) to stop the work.

        Args:
            info: the teacher, as `describe` gave it.
            spec: how to sample.
            prompts: what to go on from.
            timeout_s: of one call; 0 for none.

        Raises:
            RequestError, LimitError, CapabilityError: what this teacher cannot do; checked before anything is sent.
            LabelError: a sample that was not asked for, or is not what was asked for.
            MismatchError: the teacher behind the address is another one now.
            UnavailableError, OverloadedError: nothing came for `retry_for_s`.
        """
        call = GenerateCall(info.name, info.fingerprint, spec, prompts, timeout_s=timeout_s)
        return client.samples(self._stub, self._metadata, call, info, self._retry())

    async def _keep_stream(self) -> None:
        """Holds one stream open while requests are pending, and opens the next when it breaks."""
        while not self._closed:
            try:
                await self._run_stream()
                problem: TeacherWireError = UnavailableError(f"{self.address}: the server ended the stream")
            except grpc.RpcError as error:
                problem = self._problem(error)
            except TeacherWireError as error:
                problem = error
            except Exception as error:  # nobody may wait for ever because of a fault of ours
                log.exception("the stream to %s failed", self.address)
                problem = ServerError(f"{type(error).__name__}: {error}")
            if not isinstance(problem, status_table.RETRYABLE):
                self._fail_all(problem)
                return
            self._fail_overdue(problem)
            if not self._pending:
                return
            self.stats.reconnects += 1
            self._on_trouble(problem)
            await self._next_edge()
            await asyncio.sleep(self._pause(problem))

    async def _next_edge(self) -> None:
        """Turns to the next address, if there are several."""
        if len(self._addresses) == 1:
            return
        self._addresses.rotate(-1)
        gone = self._channel
        self._channel = self._open()
        self._stub = pb_grpc.TeacherStub(self._channel)
        await gone.close()

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
        call = self._stub.Score(metadata=self._metadata)
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
            raise silent(self.address, self._answer_s)

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
            self.stats.payload_bytes += payload
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
            self.stats.resumed_chunks += chunk.index
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
            self.stats.replies += 1
        except LabelError as error:
            self._resolve(pending, error)

    def _take_failed(self, failed: pb.ScoreFailed) -> None:
        pending = self._pending.get(failed.request_id)
        if pending is None:
            return
        problem = status_table.from_detail(failed.error)
        pause = self._pause(problem)
        self._pace.ended(failed.request_id)
        pending.heard_s = math.inf
        may_retry = isinstance(
            problem, (*status_table.RETRYABLE, *((DeadlineError,) if pending.deadline_is_ours else ()))
        )
        if not may_retry or self._is_overdue(pending, problem, pause):
            self._resolve(pending, problem)
            return
        self.stats.retries += 1
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
        heapq.heappush(self._backlog, (pending.number, pending.call.request_id))
        self._pump()

    def _pump(self) -> None:
        """Sends as many of the waiting requests as the pace allows, the oldest first."""
        if self._pump_timer is not None:
            self._pump_timer.cancel()
            self._pump_timer = None
        while self._backlog:
            request_id = self._backlog[0][1]
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

    def _pause(self, problem: TeacherWireError) -> float:
        """The server's own delay if it gave one, else 1-2 s, never the same for all students at once."""
        if isinstance(problem, OverloadedError) and problem.retry_after_s > 0:
            return problem.retry_after_s * random.uniform(1.0, 1.1)
        return random.uniform(*self._backoff_s)

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
