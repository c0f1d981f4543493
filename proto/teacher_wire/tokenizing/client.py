"""The student's half of Tokenize: rows in calls within the teacher's limits, each made again while that can help.

In: rows; out: the same rows in the teacher's tokens, in order. A call that failed is made again whole: it is cheap and always answers alike.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc

from teacher_wire.core.errors import LimitError, TeacherWireError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.tokenizing import codec
from teacher_wire.tokenizing.messages import (
    REPLY,
    TextRow,
    TokenizeCall,
    TokenizedRow,
    check_offered,
    check_tokenize,
    chunked,
)
from teacher_wire.transport.retry import Patience, Retry, silent
from teacher_wire.v2 import teacher_pb2 as pb
from teacher_wire.v2 import teacher_pb2_grpc as pb_grpc

Progress = Callable[[int, int], None]


async def tokenize(
    stub: Callable[[], pb_grpc.TeacherStub],
    metadata: Any,
    info: TeacherInfo,
    rows: Sequence[TextRow],
    retry: Retry,
    progress: Progress | None,
    timeout_s: float,
) -> list[TokenizedRow]:
    """See `TeacherClient.tokenize`. `stub` is asked for each call: the client may have turned to another edge."""
    check_offered(info)
    limit = info.limits.max_tokenize_bytes
    found = [
        TokenizedRow.refusal(f"{row.size} bytes, and the teacher takes {limit} at once") if row.size > limit else None
        for row in rows
    ]
    for numbers in chunked(rows, info):
        call = TokenizeCall(info.name, info.fingerprint, tuple(rows[number] for number in numbers), timeout_s)
        check_tokenize(call, info)
        for number, row in zip(numbers, await _answered(stub, metadata, call, info, retry), strict=True):
            found[number] = row
        if progress is not None:
            progress(sum(row is not None for row in found), len(found))
    return [row for row in found if row is not None]


async def _answered(
    stub: Callable[[], pb_grpc.TeacherStub], metadata: Any, call: TokenizeCall, info: TeacherInfo, retry: Retry
) -> list[TokenizedRow]:
    """The rows of one call, however many times it must be made; in halves where its answer is too long for a message."""
    patience, request = Patience(retry), codec.encode_request(call)
    while True:
        try:
            return codec.decode_reply(await _reply(stub(), metadata, request, retry), call, info)
        except LimitError as problem:
            if problem.field != REPLY:
                raise
            if len(call.rows) == 1:
                return [TokenizedRow.refusal(f"its ids take {problem.value} bytes, and one answer {problem.limit}")]
            break
        except TeacherWireError as problem:
            await patience.after(problem)
    middle = len(call.rows) // 2
    halves = (replace(call, rows=call.rows[:middle]), replace(call, rows=call.rows[middle:]))
    return [row for half in halves for row in await _answered(stub, metadata, half, info, retry)]


async def _reply(
    stub: pb_grpc.TeacherStub, metadata: Any, request: pb.TokenizeRequest, retry: Retry
) -> pb.TokenizeReply:
    try:
        async with asyncio.timeout(retry.answer_s if retry.answer_s < math.inf else None):
            reply: pb.TokenizeReply = await stub.Tokenize(request, metadata=metadata)
            return reply
    except TimeoutError:
        raise silent(retry.address, retry.answer_s) from None
    except grpc.RpcError as error:
        raise retry.problem(error) from None
