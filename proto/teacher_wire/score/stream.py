"""One student's Score stream: a reader, a task per request, and what waits to be sent.

In: serialised ScoreUp messages; out: serialised ScoreDown messages. It computes no label; a request is handed to the
service only when its whole reply fits the student's window and what the tenant may hold. Whatever it holds is counted.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict

from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import (
    DeadlineError,
    LimitError,
    OverloadedError,
    RequestError,
    ServerError,
    TeacherWireError,
    UnavailableError,
)
from teacher_wire.core.parsing import check_request_id
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.score import codec
from teacher_wire.score.asked import Asked, Parts, content_key, understand, understand_parts, walked_bytes
from teacher_wire.score.kept_replies import ReplyEncoder
from teacher_wire.score.outbox import Item, Outbox
from teacher_wire.score.service import SharedState
from teacher_wire.score.window import Window, open_window
from teacher_wire.transport import status_table
from teacher_wire.transport.accounts import Account
from teacher_wire.transport.caller import Caller, bare, cancelled_from_outside, known
from teacher_wire.v2 import teacher_pb2 as pb

_CONTROL_BYTES = 256  # credits, acknowledgements, cancellations: never held up by other streams' requests
_ENCODING_IS_FASTER = 32  # than decoding and checking: up to 2 MiB a thread would cost more than it spares the loop
_CHUNKS_AT_ONCE = 4  # are encoded before they are sent
_REQUEST_BYTES = 2 << 10  # what an open request takes beside its own bytes: task, arrays' headers


class ScoreStream:
    """One stream of one tenant, from its first message to its end."""

    def __init__(self, shared: SharedState, account: Account, caller: Caller) -> None:
        self._shared = shared
        self._account = account
        self._caller = caller
        self._limits = shared.limits
        self._out = Outbox()
        self._unread_refusals = 0
        self._refusals_read = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._parts: dict[str, Parts] = {}
        self._keys: OrderedDict[str, str] = OrderedDict()  # of replies sent whole and not acknowledged
        self._window: Window | None = None
        self._reader: asyncio.Task[None] | None = None
        self._draining = False

    async def run(self) -> None:
        """Reads and answers until the student has closed its side and all is answered, or the server drains.

        Raises:
            TeacherWireError: the stream is broken off: a message that is none, a peer that takes nothing, a drain.
        """
        self._reader = asyncio.create_task(self._read())
        self._shared.open_streams += 1
        item: Item | None = None
        try:
            while (item := await self._out.get()) is not None:
                await self._caller.send(item.data)
                self._sent(item)
            if self._draining:
                raise UnavailableError("the server is going down")
            await self._reader
        finally:
            self._shared.open_streams -= 1
            self._close(item)

    def drain(self) -> None:
        """Ends the stream as soon as everything it has taken is answered and sent."""
        self._draining = True
        self._end_if_drained()

    def _end_if_drained(self) -> None:
        if self._draining and not self._tasks and not self._parts:
            self._out.end()

    def _close(self, unsent: Item | None) -> None:
        """Stops all work of this stream and counts out what it holds."""
        for task in (self._reader, *self._tasks.values()):
            if task is not None:
                task.cancel()
        for request_id in list(self._parts):
            self._drop_parts(request_id)
        for item in (*([unsent] if unsent is not None else []), *self._out.unsent()):
            if item.reply_bytes:
                self._shared.accounts.drop_reply(self._account, item.reply_bytes)

    def _sent(self, item: Item) -> None:
        if item.reply_bytes:
            self._shared.accounts.reply_taken(self._account, item.reply_bytes)
        if item.refusal:
            self._unread_refusals -= 1
            self._refusals_read.set()

    # ---------------------------------------------------------------- reading

    async def _read(self) -> None:
        try:
            while (data := await self._caller.read()) is not None:
                if len(data) <= _CONTROL_BYTES:
                    await self._take(data)
                else:
                    # A tenant's streams take turns, a turn of the loop each: however many of them send how fast, what
                    # they make the loop do between two steps for another tenant is one request.
                    async with self._account.reading:
                        await self._take(data)
                        await asyncio.sleep(0)
                while self._unread_refusals >= self._limits.max_unread_refusals:  # who reads nothing is not read
                    self._refusals_read.clear()
                    await self._refusals_read.wait()
            for request_id in list(self._parts):
                self._drop_parts(request_id)
                self._fail(request_id, RequestError("the stream ended amid this request", field="part"))
            if self._tasks:
                await asyncio.wait(list(self._tasks.values()))
        finally:
            self._out.end()

    async def _take(self, data: bytes) -> None:
        up, asked = await self._shared.offload.run(
            self._account.tenant, len(data), understand, data, self._account.tenant
        )
        kind = up.WhichOneof("message") if asked is None else "request"
        if self._window is None:
            self._window = open_window(up, kind, self._limits.max_window_bytes)
        elif asked is not None:
            self._start(asked, len(data), counted=False)
        elif kind == "part":
            await self._take_part(up.part)
        elif kind == "credit":
            self._window.give_back(up.credit.bytes)
        elif kind == "ack":
            self._shared.kept.forget(self._keys.pop(up.ack.request_id, ""))
        elif kind == "cancel":
            self._drop_parts(up.cancel.request_id)
            task = self._tasks.get(up.cancel.request_id)
            if task is not None:
                task.cancel()
        else:
            raise RequestError("unexpected message on an open stream", field="message", value=kind or "empty")

    async def _take_part(self, part: pb.RequestPart) -> None:
        """Collects a request that comes in parts; what was refused or taken back is ignored."""
        request_id = part.request_id
        if part.offset == 0:
            if not self._begin_parts(request_id, part.total_bytes):
                return
        elif request_id not in self._parts:
            return
        parts, data = self._parts[request_id], part.data
        stop = parts.received + len(data)
        if not data or part.offset != parts.received or part.total_bytes != parts.size or stop > parts.size:
            self._drop_parts(request_id)
            shown = f"{len(data)} bytes at {part.offset} of {part.total_bytes}"
            limit = f"at {stop - len(data)} of {parts.size}"
            self._fail(
                request_id, RequestError("not the next part of this request", field="part", value=shown, limit=limit)
            )
            return
        if not parts.data or len(parts.data[-1]) >= codec.PART_BYTES:
            parts.data.append(bytearray())
        parts.data[-1] += data
        parts.received = stop
        parts.timer.cancel()
        if stop < parts.size:
            parts.timer = self._timer(request_id)
            return
        del self._parts[request_id]
        try:
            asked = await self._shared.offload.run(
                self._account.tenant, parts.size, understand_parts, parts.data, self._account.tenant, request_id
            )
        except BaseException:
            self._shared.accounts.close_request(self._account, parts.size)
            raise
        self._start(asked, parts.size, counted=True)

    def _begin_parts(self, request_id: str, size: int) -> bool:
        try:
            check_request_id(request_id)
            limit = self._limits.max_request_bytes
            if not 1 <= size <= limit:
                raise LimitError("a request this long", field="part.total_bytes", value=size, limit=f"1..{limit}")
            self._check_new(request_id)
            self._shared.accounts.open_request(self._account, size)
        except TeacherWireError as error:
            self._drop_parts(request_id)
            self._fail(request_id, error)
            return False
        self._parts[request_id] = Parts(size, self._timer(request_id))
        return True

    def _timer(self, request_id: str) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._limits.stall_s, self._give_up, request_id)

    def _give_up(self, request_id: str) -> None:
        """A request whose next part did not come."""
        self._drop_parts(request_id)
        self._fail(
            request_id, DeadlineError("the next part did not come in time", field="stall_s", limit=self._limits.stall_s)
        )

    def _drop_parts(self, request_id: str) -> None:
        parts = self._parts.pop(request_id, None)
        if parts is not None:
            parts.timer.cancel()
            self._shared.accounts.close_request(self._account, parts.size)
            self._end_if_drained()

    # -------------------------------------------------------------- answering

    def _check_new(self, request_id: str) -> None:
        if request_id in self._tasks or request_id in self._parts:
            raise RequestError("a request of this id is still open", field="request_id", value=request_id)
        if self._draining:
            raise UnavailableError("the server is going down")
        count, limit = len(self._tasks) + len(self._parts), self._limits.max_open_requests
        if count >= limit:
            raise OverloadedError(
                "too many open requests on this stream",
                field="open_requests", value=count, limit=limit, retry_after_s=1.0,
            )  # fmt: skip

    def _start(self, asked: Asked, size: int, *, counted: bool) -> None:
        """Answers a request; `counted` if its bytes are with the account already."""
        accounts, account = self._shared.accounts, self._account
        held = size if counted else size + _REQUEST_BYTES
        try:
            if asked.problem is not None:
                raise asked.problem
            self._check_new(asked.request_id)
            if not counted:
                accounts.open_request(account, held)
        except TeacherWireError as error:
            if counted:
                accounts.close_request(account, held)
            self._fail(asked.request_id, error)
            self._end_if_drained()
            return
        task = asyncio.create_task(self._answer(asked))
        self._tasks[asked.request_id] = task
        self._shared.open_requests += 1
        task.add_done_callback(lambda _: self._ended(asked.request_id, held))

    def _ended(self, request_id: str, held: int) -> None:
        self._shared.open_requests -= 1
        self._shared.accounts.close_request(self._account, held)
        del self._tasks[request_id]
        self._end_if_drained()

    def _fail(self, request_id: str, error: TeacherWireError, *, first: bool = False) -> None:
        try:
            check_request_id(request_id)
        except RequestError:
            request_id = ""  # an id that is none is not sent back
        failed = pb.ScoreFailed(request_id=request_id, error=status_table.to_detail(bare(error)))
        self._unread_refusals += 1
        self._out.put(Item(pb.ScoreDown(failed=failed).SerializeToString(), refusal=True), first=first)

    async def _answer(self, asked: Asked) -> None:
        assert asked.call is not None
        first = asked.call.interactive
        try:
            reply = self._shared.kept.find(asked.key) if asked.key else None
            if reply is None:
                await self._send(asked, asked.call, await self._compute(asked.call))
                return
            await self._hold(reply.payload_bytes, first=first)
            self._remember(asked.request_id, asked.key)
            skipped = asked.next_chunk if asked.reply_id == reply.reply_id else 0
            assert self._window is not None
            for _, size in reply.chunks[:skipped]:  # the student has these already
                self._window.give_back(size)
                self._shared.accounts.drop_reply(self._account, size)
            for data, size in reply.chunks[skipped:]:
                self._out.put(Item(data, size), first=first)
            self._out.put(Item(reply.done), first=first)
        except asyncio.CancelledError as error:
            if cancelled_from_outside():
                raise
            self._fail(asked.request_id, known(error), first=first)  # the student must not wait for ever
        except Exception as error:
            self._fail(asked.request_id, known(error), first=first)

    async def _send(self, asked: Asked, call: ScoreCall, signals: TeacherSignals) -> None:
        """Sends what is held already as it is encoded."""
        left, tenant = signals.payload_bytes, self._account.tenant
        walked = left // _ENCODING_IS_FASTER  # the last chunks of a long answer go the way of the others
        try:
            encoder = ReplyEncoder(call, signals)
            while left:
                chunks = await self._shared.offload.run(tenant, walked, encoder.encode, _CHUNKS_AT_ONCE)
                assert chunks, "the chunks of an answer hold all of its bytes"
                for data, size in chunks:
                    self._out.put(Item(data, size), first=call.interactive)
                    left -= size
            key = asked.key or await self._shared.offload.run(tenant, walked_bytes(call), content_key, call)
            reply = encoder.reply()
        except BaseException:
            assert self._window is not None
            self._window.give_back(left)
            self._shared.accounts.drop_reply(self._account, left)
            raise
        self._remember(asked.request_id, key)
        self._shared.kept.keep(key, reply)
        self._out.put(Item(reply.done), first=call.interactive)

    def _remember(self, request_id: str, key: str) -> None:
        """Until the student acknowledges it; one that never does is forgotten with what is kept."""
        self._keys[request_id] = key
        while len(self._keys) > 2 * self._limits.max_open_requests:
            self._keys.popitem(last=False)

    async def _hold(self, size: int, *, first: bool) -> None:
        """Takes `size` reply bytes from the student's window and from what the tenant may hold; `first` before others that wait for either."""
        assert self._window is not None
        await self._window.take(size, first=first)
        try:
            await self._shared.accounts.hold_reply(self._account, size, first=first)
        except BaseException:
            self._window.give_back(size)
            raise

    async def _compute(self, call: ScoreCall) -> TeacherSignals:
        """The answer, whose bytes are held from now on."""
        info = await self._shared.service.info(call.teacher, call.fingerprint)
        needed = await self._shared.offload.run(call.tenant, walked_bytes(call), codec.check_call, call, info)
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(call.timeout_s or None):
                await self._hold(needed, first=call.interactive)
                try:
                    signals = await self._shared.service.score(call)
                    self._settle(needed, signals.payload_bytes)
                except BaseException:
                    assert self._window is not None
                    self._window.give_back(needed)
                    self._shared.accounts.drop_reply(self._account, needed)
                    raise
        except TimeoutError as error:
            raise DeadlineError(
                "not answered in time",
                field="timeout_s",
                value=f"{time.monotonic() - started_s:.3f}",
                limit=call.timeout_s,
            ) from error
        return signals

    def _settle(self, held: int, size: int) -> None:
        """An answer of another size than was asked for is refused by the student; until then it is counted as it is."""
        if held < size:
            raise ServerError(
                "the answer is larger than what was asked for", field="reply bytes", value=size, limit=held
            )
        if held > size:
            assert self._window is not None
            self._window.give_back(held - size)
            self._shared.accounts.drop_reply(self._account, held - size)
