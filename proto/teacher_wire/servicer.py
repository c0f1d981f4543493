"""The server half of the contract: streams, windows, resumption. What answers is a `TeacherService`.

In: protocol messages; out: protocol messages. It never computes a label and holds no policy but
the window: a request is handed to the service only when its whole reply fits the student's window.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from teacher_wire import PROTOCOL, codec, generate_servicer, status, status_codec
from teacher_wire.errors import (
    CapabilityError,
    DeadlineError,
    LimitError,
    OverloadedError,
    RequestError,
    ServerError,
    TeacherWireError,
    UnavailableError,
)
from teacher_wire.generation import GenerateCall, Sample
from teacher_wire.messages import HeadHeader, ScoreCall, ServerStatus, TeacherInfo, TeacherSignals
from teacher_wire.v1 import teacher_pb2 as pb
from teacher_wire.v1 import teacher_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

Context: TypeAlias = Any  # grpc.aio.ServicerContext, which ships no types


class TeacherService(Protocol):
    """What stands behind the contract: Serve handles in production, a fake in tests."""

    async def describe(self) -> list[TeacherInfo]:
        """Every teacher of this deployment."""

    async def info(self, teacher: str, fingerprint: str = "") -> TeacherInfo:
        """One teacher; the empty name means the only one. Raises NotFoundError.

        While its weights are being changed there are two descriptions: the one with `fingerprint` is given if it is
        (still) there, else the newest.
        """

    async def score(self, call: ScoreCall) -> TeacherSignals:
        """The labels. Must stop the work it can stop when cancelled."""

    def generate(self, call: GenerateCall) -> AsyncIterator[Sample]:
        """Samples as they finish; closing the iterator stops the work."""

    async def head_header(self, teacher: str, fingerprint: str) -> HeadHeader:
        """Shape, scale and digest of the output head. Raises CapabilityError."""

    async def head_bytes(self, teacher: str, fingerprint: str, offset: int, size: int) -> bytes:
        """A slice of the weight's bytes."""


@dataclass(frozen=True)
class StreamLimits:
    """What one stream may hold.

    Attributes:
        max_window_bytes: largest window a student may open.
        max_open_requests: unanswered requests of one stream.
        kept_reply_bytes: finished replies kept for resumption, all streams together.
        kept_reply_s: how long they are kept.
    """

    max_window_bytes: int = 256 << 20
    max_open_requests: int = 1024
    kept_reply_bytes: int = 256 << 20
    kept_reply_s: float = 120.0


def anonymous(context: Context) -> str:
    """The tenant of every caller when there is no authentication."""
    return ""


class TeacherServicer(pb_grpc.TeacherServicer):
    """Speaks the contract for a `TeacherService`.

    Args:
        service: what answers.
        server_version: told to students.
        limits: what one stream may hold.
        tenant_of: who is calling, from the call's context; may raise a TeacherWireError.
        status_for: how the server is doing, as the tenant of that name may see it.
    """

    def __init__(
        self,
        service: TeacherService,
        *,
        server_version: str = "",
        limits: StreamLimits | None = None,
        tenant_of: Callable[[Context], str] = anonymous,
        status_for: Callable[[str], Awaitable[ServerStatus]] | None = None,
    ) -> None:
        self._service = service
        self._version = server_version
        self._limits = limits or StreamLimits()
        self._tenant_of = tenant_of
        self._status_for = status_for
        self._kept = _KeptReplies(self._limits.kept_reply_bytes, self._limits.kept_reply_s)
        self.open_streams = 0
        self.open_requests = 0

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeReply:
        try:
            return codec.encode_description(await self._service.describe(), self._version)
        except Exception as error:
            await _abort(context, error)
            raise

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusReply:
        try:
            if self._status_for is None:
                raise CapabilityError("this server keeps no status", field="Status")
            return status_codec.encode_status(await self._status_for(self._tenant_of(context)))
        except Exception as error:
            await _abort(context, error)
            raise

    async def Head(self, request: pb.HeadRequest, context: Context) -> AsyncIterator[pb.HeadChunk]:
        try:
            header = await self._service.head_header(request.teacher, request.fingerprint)
            yield codec.encode_head_header(header)
            for offset in range(0, header.weight_bytes, codec.CHUNK_BYTES):
                size = min(codec.CHUNK_BYTES, header.weight_bytes - offset)
                data = await self._service.head_bytes(request.teacher, request.fingerprint, offset, size)
                yield pb.HeadChunk(offset=offset, data=data)
        except Exception as error:
            await _abort(context, error)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateDown]:
        self.open_requests += 1
        try:
            async with contextlib.aclosing(
                generate_servicer.answers(self._service, request, self._tenant_of(context))
            ) as answers:
                async for message in answers:
                    yield message
        except Exception as error:
            await _abort(context, error)
        finally:
            self.open_requests -= 1

    async def Score(self, requests: AsyncIterator[pb.ScoreUp], context: Context) -> AsyncIterator[pb.ScoreDown]:
        try:
            tenant = self._tenant_of(context)
        except TeacherWireError as error:
            await _abort(context, error)
        stream = _Stream(self, self._service, self._kept, self._limits, tenant)
        self.open_streams += 1
        try:
            async for message in stream.answers(requests):
                yield message
        except TeacherWireError as error:
            await _abort(context, error)
        finally:
            self.open_streams -= 1
            stream.close()


async def _abort(context: Context, error: Exception) -> None:
    """Ends a call with the error's code and detail."""
    known = _known(error)
    detail = status.to_detail(known).SerializeToString()
    await context.abort(status.code_of(known), str(known), ((status.DETAIL_KEY, detail),))


def _known(error: Exception) -> TeacherWireError:
    """Faults of our own become a ServerError, and are logged with their trace."""
    if isinstance(error, TeacherWireError):
        return error
    log.exception("unexpected %s while answering", type(error).__name__, exc_info=error)
    return ServerError(f"{type(error).__name__}: {error}")


class _Stream:
    """One student's stream: a reader, a task per request, and what waits to be sent."""

    def __init__(
        self, servicer: TeacherServicer, service: TeacherService, kept: _KeptReplies, limits: StreamLimits, tenant: str
    ) -> None:
        self._servicer = servicer
        self._service = service
        self._kept = kept
        self._limits = limits
        self._tenant = tenant
        self._out: asyncio.Queue[pb.ScoreDown | None] = asyncio.Queue()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._keys: dict[str, str] = {}
        self._window: _Window | None = None
        self._reader: asyncio.Task[None] | None = None

    async def answers(self, requests: AsyncIterator[pb.ScoreUp]) -> AsyncIterator[pb.ScoreDown]:
        """Everything to be sent down, until the student has closed its side and all is answered."""
        self._reader = asyncio.create_task(self._read(requests))
        while (message := await self._out.get()) is not None:
            yield message
        await self._reader

    def close(self) -> None:
        """Stops all work of this stream."""
        for task in (self._reader, *self._tasks.values()):
            if task is not None:
                task.cancel()

    async def _read(self, requests: AsyncIterator[pb.ScoreUp]) -> None:
        try:
            async for up in requests:
                self._take(up)
            if self._tasks:
                await asyncio.wait(list(self._tasks.values()))
        finally:
            self._out.put_nowait(None)

    def _take(self, up: pb.ScoreUp) -> None:
        kind = up.WhichOneof("message")
        if self._window is None:
            self._window = self._open(up, kind)
        elif kind == "request":
            self._start(up.request)
        elif kind == "credit":
            self._window.give_back(up.credit.bytes)
        elif kind == "ack":
            self._kept.forget(self._keys.pop(up.ack.request_id, ""))
        elif kind == "cancel":
            task = self._tasks.get(up.cancel.request_id)
            if task is not None:
                task.cancel()
        else:
            raise RequestError("unexpected message on an open stream", field="message", value=kind or "empty")

    def _open(self, up: pb.ScoreUp, kind: str | None) -> _Window:
        if kind != "open":
            raise RequestError("the first message must be Open", field="message", value=kind or "empty", limit="open")
        if up.open.protocol != PROTOCOL:
            raise CapabilityError(
                "the student speaks another protocol version",
                field="protocol",
                value=up.open.protocol,
                limit=PROTOCOL,
            )
        if not 1 <= up.open.window_bytes <= self._limits.max_window_bytes:
            raise LimitError(
                "window", field="window_bytes", value=up.open.window_bytes, limit=f"1..{self._limits.max_window_bytes}"
            )
        return _Window(up.open.window_bytes)

    def _start(self, request: pb.ScoreRequest) -> None:
        request_id = request.request_id
        if request_id in self._tasks:
            self._fail(
                request_id, RequestError("a request of this id is still open", field="request_id", value=request_id)
            )
            return
        if len(self._tasks) >= self._limits.max_open_requests:
            error = OverloadedError(
                "too many open requests on this stream",
                field="open_requests", value=len(self._tasks), limit=self._limits.max_open_requests, retry_after_s=1.0,
            )  # fmt: skip
            self._fail(request_id, error)
            return
        task = asyncio.create_task(self._answer(request))
        self._tasks[request_id] = task
        self._servicer.open_requests += 1
        task.add_done_callback(lambda _: self._ended(request_id))

    def _ended(self, request_id: str) -> None:
        self._servicer.open_requests -= 1
        del self._tasks[request_id]

    def _fail(self, request_id: str, error: TeacherWireError) -> None:
        failed = pb.ScoreFailed(request_id=request_id, error=status.to_detail(error))
        self._out.put_nowait(pb.ScoreDown(failed=failed))

    async def _answer(self, request: pb.ScoreRequest) -> None:
        try:
            call = codec.decode_call(request, self._tenant)
            key = _content_key(request, self._tenant)
            reply = self._kept.find(key)
            assert self._window is not None
            if reply is None:
                reply = await self._compute(call)
                self._kept.keep(key, reply)
            else:
                await self._window.take(reply.payload_bytes)
            self._keys[request.request_id] = key
            resumed = request.HasField("resume") and request.resume.reply_id == reply.reply_id
            skipped = request.resume.next_chunk if resumed else 0
            for down in reply.chunks[:skipped]:  # the student has these already
                self._window.give_back(codec.payload_bytes(down.chunk))
            for down in reply.chunks[skipped:]:
                self._out.put_nowait(down)
            self._out.put_nowait(pb.ScoreDown(done=reply.done))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # The service gave up by itself: the student must not wait for ever.
            self._fail(request.request_id, UnavailableError("the server dropped the request"))
        except Exception as error:
            self._fail(request.request_id, _known(error))

    async def _compute(self, call: ScoreCall) -> _Reply:
        info = await self._service.info(call.teacher, call.fingerprint)
        codec.check_call(call, info)
        needed = codec.reply_bytes(call, info)
        assert self._window is not None
        started = time.monotonic()
        try:
            async with asyncio.timeout(call.timeout_s or None):
                await self._window.take(needed)
                try:
                    signals = await self._service.score(call)
                except BaseException:
                    self._window.give_back(needed)
                    raise
        except TimeoutError as error:
            raise DeadlineError(
                "not answered in time",
                field="timeout_s",
                value=f"{time.monotonic() - started:.3f}",
                limit=call.timeout_s,
            ) from error
        reply_id = secrets.randbits(64)
        chunks = list(codec.encode_chunks(call.request_id, reply_id, signals))
        done = pb.ScoreDone(
            request_id=call.request_id,
            reply_id=reply_id,
            chunks=len(chunks),
            rows=signals.rows,
            fingerprint=signals.fingerprint,
            timing=codec.encode_timing(signals.timing),
        )
        return _Reply(reply_id, chunks, done, signals.payload_bytes, time.monotonic())


class _Window:
    """Payload bytes the student is ready to hold; handed out first come, first served."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int) -> None:
        """Waits until `size` bytes are free, and takes them.

        Raises:
            LimitError: they can never be.
        """
        if size > self.size:
            raise LimitError(
                "the reply is larger than the student's window", field="window_bytes", value=self.size, limit=size
            )
        if not self._waiting and size <= self.free:
            self.free -= size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(size)
            raise

    def give_back(self, size: int) -> None:
        """Makes `size` bytes free again and wakes whoever now fits."""
        self.free = min(self.size, self.free + size)
        while self._waiting and (self._waiting[0][0] <= self.free or self._waiting[0][1].done()):
            wanted, turn = self._waiting.popleft()
            if not turn.done():
                self.free -= wanted
                turn.set_result(None)


@dataclass
class _Reply:
    """A finished answer, ready to be sent again."""

    reply_id: int
    chunks: list[pb.ScoreDown]
    done: pb.ScoreDone
    payload_bytes: int
    born: float


class _KeptReplies:
    """Finished answers until the student acknowledges them, bounded in bytes and seconds."""

    def __init__(self, max_bytes: int, max_age_s: float) -> None:
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._replies: OrderedDict[str, _Reply] = OrderedDict()
        self.kept_bytes = 0

    def find(self, key: str) -> _Reply | None:
        self._expire()
        return self._replies.get(key)

    def keep(self, key: str, reply: _Reply) -> None:
        self.forget(key)  # two streams may have computed the same
        self._replies[key] = reply
        self.kept_bytes += reply.payload_bytes
        self._expire()

    def forget(self, key: str) -> None:
        reply = self._replies.pop(key, None)
        if reply is not None:
            self.kept_bytes -= reply.payload_bytes

    def _expire(self) -> None:
        oldest_allowed = time.monotonic() - self._max_age_s
        while self._replies:
            key, reply = next(iter(self._replies.items()))
            if self.kept_bytes <= self._max_bytes and reply.born >= oldest_allowed:
                return
            self.forget(key)


def _content_key(request: pb.ScoreRequest, tenant: str) -> str:
    """Names a reply by who asked and everything that was asked: no id can be guessed to get another's labels."""
    digest = hashlib.sha256()
    spec = request.spec.SerializeToString(deterministic=True)
    parts: list[Any] = [
        tenant.encode(),
        request.request_id.encode(),
        request.teacher.encode(),
        request.fingerprint.encode(),
    ]
    parts += [spec, request.token_ids.data, request.cu_lengths.data, request.wanted.data]
    parts.append(request.extra_ids.data)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
