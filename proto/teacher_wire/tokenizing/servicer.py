"""The server half of Tokenize: a request is checked, handed to the service, and its rows go back in one message.

In: a serialised request; out: a serialised reply. It tokenises nothing itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from teacher_wire.core.errors import DeadlineError, LimitError, UnavailableError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.parsing import check_names, parse
from teacher_wire.tokenizing import codec
from teacher_wire.tokenizing.messages import (
    MAX_REPLY_BYTES,
    REPLY,
    TokenizeCall,
    TokenizedRow,
    check_offered,
    check_tokenize,
)
from teacher_wire.transport.offload import Offload
from teacher_wire.v2 import teacher_pb2 as pb


class TokenizeService(Protocol):
    """The part of a `TeacherService` that answers Tokenize."""

    async def info(self, teacher: str, fingerprint: str = "") -> TeacherInfo:
        """See `TeacherService.info`."""

    async def tokenize(self, call: TokenizeCall) -> list[TokenizedRow]:
        """One answer for each row, in order. Must stop the work it can stop when cancelled."""


async def answer(service: TokenizeService, data: bytes, tenant: str, offload: Offload) -> bytes:
    """The serialised reply.

    Args:
        service: tokenises.
        data: a serialised TokenizeRequest.
        tenant: who calls.
        offload: decodes and encodes what is long.

    Raises:
        TeacherWireError: refused, overloaded, late or failed.
    """
    request = await offload.run(tenant, len(data), _parsed, data)
    info = await service.info(request.teacher, request.fingerprint)
    call = await offload.run(tenant, len(data), _checked, request, tenant, info)
    del request
    try:
        async with asyncio.timeout(call.timeout_s or None):
            rows = await service.tokenize(call)
    except TimeoutError:
        raise DeadlineError(
            "not tokenised in time", field="timeout_s", value=f"{len(call.rows)} rows", limit=call.timeout_s
        ) from None
    if len(rows) != len(call.rows):
        raise UnavailableError("the server dropped rows", field="rows", value=len(rows), limit=len(call.rows))
    size = sum(4 * (len(row.token_ids_T) + len(row.byte_ends_C)) for row in rows)
    if size > MAX_REPLY_BYTES:  # prompts that a chat template makes may be longer than what they are made of
        raise LimitError("the answer is too long: send fewer rows", field=REPLY, value=size, limit=MAX_REPLY_BYTES)
    return await offload.run(tenant, size, _serialised, rows, info.fingerprint)


def _parsed(data: bytes) -> pb.TokenizeRequest:
    request = parse(pb.TokenizeRequest, data)
    check_names(request, "teacher", "fingerprint")
    return request


def _checked(request: pb.TokenizeRequest, tenant: str, info: TeacherInfo) -> TokenizeCall:
    check_offered(info)
    call = codec.decode_request(request, tenant, info.limits.max_tokenize_rows)
    check_tokenize(call, info)
    return call


def _serialised(rows: Sequence[TokenizedRow], fingerprint: str) -> bytes:
    return codec.encode_reply(rows, fingerprint).SerializeToString()
