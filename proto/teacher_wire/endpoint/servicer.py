"""The server half of the contract: every call is counted, answered by a `TeacherService`, and ended with a status.

In: serialised messages; out: serialised messages. They are parsed by us and not by gRPC, so that a message that is none is
refused as such and a long one does not hold up the event loop. It computes no label; its only policy is `StreamLimits`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import grpc

from teacher_wire.artifacts import servicer as artifacts
from teacher_wire.core.errors import CapabilityError, TeacherWireError, UnavailableError
from teacher_wire.core.parsing import parse
from teacher_wire.core.status import ServerStatus
from teacher_wire.endpoint import status_codec
from teacher_wire.endpoint.service import TeacherService
from teacher_wire.generate import servicer as generate_servicer
from teacher_wire.publish import servicer as publish_servicer
from teacher_wire.score import codec
from teacher_wire.score.kept_replies import KeptReplies
from teacher_wire.score.service import SharedState
from teacher_wire.score.stream import ScoreStream
from teacher_wire.tokenizing import servicer as tokenize_servicer
from teacher_wire.transport.accounts import Account, Accounts
from teacher_wire.transport.caller import Caller, Context, abort, bare, cancelled_from_outside, known
from teacher_wire.transport.offload import Offload
from teacher_wire.transport.stream_limits import KEPT_REPLY_S, StreamLimits
from teacher_wire.transport.versions import OtherVersions
from teacher_wire.v2 import teacher_pb2 as pb

__all__ = ["StreamLimits", "TeacherService", "TeacherServicer", "anonymous"]

_TOKENIZED = 4  # bytes of a reply of Tokenize per byte of its request: eight per token of three bytes, and the prompts of templates
SERVICE = pb.DESCRIPTOR.services_by_name["Teacher"].full_name


def anonymous(context: Context) -> str:
    """The tenant of every caller when there is no authentication."""
    return ""


def uncharged(tenant: str, size_bytes: int) -> None:
    """The price of an artifact when there are no quotas."""


class TeacherServicer:
    """Speaks the contract for a `TeacherService`.

    Args:
        service: what answers.
        server_version: told to students.
        limits: what is held for peers at most.
        tenant_of: who is calling, from the call's context; may raise a TeacherWireError.
        status_for: how the server is doing, as the tenant of that name may see it.
        charge: told of a tenant's bytes of an artifact before they are sent; may raise an OverloadedError.
        offload: threads for long messages; its own if not given.
        publisher: takes revisions of teachers; None where none can be published.
    """

    def __init__(
        self,
        service: TeacherService,
        *,
        server_version: str = "",
        limits: StreamLimits | None = None,
        tenant_of: Callable[[Context], str] = anonymous,
        status_for: Callable[[str], Awaitable[ServerStatus]] | None = None,
        charge: Callable[[str, int], None] = uncharged,
        offload: Offload | None = None,
        publisher: publish_servicer.PublishService | None = None,
    ) -> None:
        self._service = service
        self._publisher = publisher
        self._version = server_version
        self._limits = limits or StreamLimits()
        self._tenant_of = tenant_of
        self._status_for = status_for
        self._charge = charge
        self._kept = KeptReplies(self._limits.kept_reply_bytes, KEPT_REPLY_S)
        self._accounts = Accounts(self._limits)
        self._offload = offload or Offload()
        self._shared = SharedState(service, self._limits, self._accounts, self._kept, self._offload)
        self._streams: set[ScoreStream] = set()
        self._draining = False

    @property
    def open_streams(self) -> int:
        """Score streams, now."""
        return self._shared.open_streams

    @property
    def open_requests(self) -> int:
        """Unanswered Score requests, and open calls of Generate, Artifact and Tokenize."""
        return self._shared.open_requests

    @property
    def held(self) -> dict[str, int]:
        """What is held for all peers together, as `StreamLimits` bounds it."""
        total = self._accounts.total
        return {
            "open_calls": total.calls,
            "request_bytes": total.request_bytes,
            "reply_bytes": total.reply_bytes,
            "kept_reply_bytes": self._kept.kept_bytes,
        }

    def add_to(self, server: grpc.aio.Server) -> None:
        """Answers the service's calls on that server."""
        handlers = {
            "Describe": grpc.unary_unary_rpc_method_handler(self._describe),
            "Status": grpc.unary_unary_rpc_method_handler(self._status),
            "Score": grpc.stream_stream_rpc_method_handler(self._score),
            # One request each, and the same on the wire; but so a call is counted before its message is received.
            "Generate": grpc.stream_stream_rpc_method_handler(self._generate),
            "Artifact": grpc.stream_stream_rpc_method_handler(self._artifact),
            "Tokenize": grpc.stream_stream_rpc_method_handler(self._tokenize),
            "Publish": grpc.stream_stream_rpc_method_handler(self._publish),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers), OtherVersions()))

    async def drain(self, timeout_s: float) -> bool:
        """Takes nothing new and waits until everything taken is answered and sent, or time is up; whether it was.

        A Score stream ends, as unavailable, when all that it had asked for is sent.
        """
        self._draining = True
        for stream in list(self._streams):
            stream.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._accounts.total.calls:
                    await asyncio.sleep(0.02)
        return not self._accounts.total.calls

    async def _describe(self, data: bytes, context: Context) -> bytes:
        return await _ended_with_status(self._description(data), context) or b""

    async def _status(self, data: bytes, context: Context) -> bytes:
        return await _ended_with_status(self._status_of(data, context), context) or b""

    async def _score(self, _requests: Any, context: Context) -> None:
        await _ended_with_status(self._score_stream(context), context)

    async def _generate(self, _requests: Any, context: Context) -> None:
        await _ended_with_status(self._generate_call(context), context)

    async def _artifact(self, _requests: Any, context: Context) -> None:
        await _ended_with_status(self._artifact_call(context), context)

    async def _tokenize(self, _requests: Any, context: Context) -> None:
        await _ended_with_status(self._tokenize_call(context), context)

    async def _publish(self, _requests: Any, context: Context) -> None:
        await _ended_with_status(self._publish_call(context), context)

    async def _description(self, data: bytes) -> bytes:
        parse(pb.DescribeRequest, data)
        return codec.encode_description(await self._service.describe(), self._version).SerializeToString()

    async def _status_of(self, data: bytes, context: Context) -> bytes:
        parse(pb.StatusRequest, data)
        if self._status_for is None:
            raise CapabilityError("this server keeps no status", field="Status")
        return status_codec.encode_status(await self._status_for(self._tenant_of(context))).SerializeToString()

    async def _score_stream(self, context: Context) -> None:
        async with self._call(context) as account:
            stream = ScoreStream(self._shared, account, Caller(context, self._limits.stall_s))
            self._streams.add(stream)
            try:
                await stream.run()
            finally:
                self._streams.discard(stream)

    async def _generate_call(self, context: Context) -> None:
        async with self._call(context) as account:
            caller = Caller(context, self._limits.stall_s)
            async with self._request(account, caller) as data:
                answers = generate_servicer.answers(self._service, data, account.tenant, self._offload)
                async with contextlib.aclosing(answers):
                    async for message in answers:
                        await caller.send(message)

    async def _artifact_call(self, context: Context) -> None:
        async with self._call(context) as account:
            caller = Caller(context, self._limits.stall_s)
            async with self._request(account, caller) as data:
                self._accounts.open_artifact(account)
                try:
                    chunks = artifacts.chunks(self._service, data, lambda size: self._charge(account.tenant, size))
                    async with contextlib.aclosing(chunks):
                        async for message in chunks:
                            await caller.send(message)
                finally:
                    self._accounts.close_artifact(account)

    async def _tokenize_call(self, context: Context) -> None:
        async with self._call(context) as account:
            caller = Caller(context, self._limits.stall_s)
            async with self._request(account, caller) as data:
                expected = _TOKENIZED * len(data)
                await self._accounts.hold_reply(account, expected)
                try:
                    reply = await tokenize_servicer.answer(self._service, data, account.tenant, self._offload)
                    self._charge(account.tenant, len(reply))
                    await caller.send(reply)
                except BaseException:
                    self._accounts.drop_reply(account, expected)
                    raise
                self._accounts.reply_taken(account, expected)

    async def _publish_call(self, context: Context) -> None:
        async with self._call(context) as account:
            caller = Caller(context, self._limits.stall_s)
            async with account.receiving:
                first = (
                    await caller.read_only()
                )  # before any refusal: who writes to a call that has ended does not hear why
            if self._publisher is None:
                raise CapabilityError("this server takes no revisions", field="Publish")
            await publish_servicer.serve(
                self._publisher, first, caller.read, caller.send, account.tenant, self._limits.stall_s
            )

    @contextlib.asynccontextmanager
    async def _call(self, context: Context) -> AsyncIterator[Account]:
        """A call of a tenant while it is open."""
        if self._draining:
            raise UnavailableError("the server is going down")
        account = self._accounts.enter(self._tenant_of(context))
        try:
            yield account
        finally:
            self._accounts.leave(account)

    @contextlib.asynccontextmanager
    async def _request(self, account: Account, caller: Caller) -> AsyncIterator[bytes]:
        """The request of a call that is one request, counted while it is answered."""
        async with account.receiving:
            data = await caller.read_only()
        size = len(data)
        self._accounts.open_request(account, size)
        self._shared.open_requests += 1
        try:
            yield data
        finally:
            self._shared.open_requests -= 1
            self._accounts.close_request(account, size)


async def _ended_with_status(answering: Coroutine[Any, Any, bytes | None], context: Context) -> bytes | None:
    """The result of `answering`; if it fails, the peer is told, and None is for a peer that is gone.

    gRPC keeps the AbortError that tells it, in a cycle with the call, and so every frame which that error passes through
    until the next garbage collection. Hence it is raised here, out of reach of the frames that hold the peer's message.
    """
    result, failure = await _outcome(answering)
    if failure is not None:
        await abort(context, failure)
    return result


async def _outcome(answering: Coroutine[Any, Any, bytes | None]) -> tuple[bytes | None, TeacherWireError | None]:
    """The result, or the failure without its frames."""
    try:
        return await answering, None
    except asyncio.CancelledError as error:
        if cancelled_from_outside():
            raise
        return None, bare(known(error))
    except Exception as error:
        return None, bare(known(error))
