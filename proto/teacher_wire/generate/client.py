"""The student's half of Generate: one call after another until every sample is there, none of them twice.

In: a call; out: its samples. A call that breaks is made again without what has arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import grpc

from teacher_wire.core.errors import TeacherWireError, UnavailableError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.generate import codec
from teacher_wire.generate.messages import GenerateCall, Sample, check_generate
from teacher_wire.transport import status_table
from teacher_wire.v2 import teacher_pb2_grpc as pb_grpc

Message = TypeVar("Message")


class Counts(Protocol):
    """What is counted of retries."""

    retries: int


@dataclass(frozen=True)
class Retry:
    """How long a call that fails is made again; the clock starts with the first failure since anything came.

    Attributes:
        address, route: of the server, for errors.
        answer_s: of silence, after which a call has failed.
    """

    address: str
    retry_for_s: float
    pause_s: Callable[[TeacherWireError], float]
    on_trouble: Callable[[TeacherWireError], None]
    stats: Counts
    route: str = ""
    answer_s: float = math.inf


async def samples(
    stub: pb_grpc.TeacherStub, metadata: Any, call: GenerateCall, info: TeacherInfo, retry: Retry
) -> AsyncGenerator[Sample, None]:
    """See `TeacherClient.generate`."""
    check_generate(call, info)
    received = set(call.have)
    failing_since: float | None = None
    while True:
        try:
            async with contextlib.aclosing(_one_call(stub, metadata, call, info, received, retry)) as arriving:
                async for sample in arriving:
                    failing_since = None
                    yield sample
            return
        except TeacherWireError as problem:
            if len(received) == call.prompts.prompts * call.spec.samples and isinstance(
                problem, status_table.RETRYABLE
            ):
                return  # only the word that this was all got lost
            now = time.monotonic()
            failing_since = now if failing_since is None else failing_since
            pause_s = retry.pause_s(problem)
            if not isinstance(problem, status_table.RETRYABLE) or now + pause_s - failing_since >= retry.retry_for_s:
                raise
            retry.stats.retries += 1
            retry.on_trouble(problem)
            await asyncio.sleep(pause_s)
            call = replace(call, have=frozenset(received))


async def _one_call(
    stub: pb_grpc.TeacherStub,
    metadata: Any,
    call: GenerateCall,
    info: TeacherInfo,
    received: set[tuple[int, int]],
    retry: Retry,
) -> AsyncGenerator[Sample, None]:
    """The samples of one call, checked and added to `received`; cancels it when closed."""
    stream = stub.Generate(codec.encode_generate(call), metadata=metadata)
    before = len(received)
    try:
        async for down in within(stream, retry.answer_s, retry.address):
            kind = down.WhichOneof("message")
            if kind == "done":
                codec.check_end(down.done, call, len(received) - before)
                return
            if kind == "sample":
                sample = codec.decode_sample(down.sample, call, info, received)
                received.add((sample.prompt, sample.index))
                yield sample
    except grpc.RpcError as error:
        raise status_table.from_rpc(error, retry.address, retry.route) from None
    finally:
        stream.cancel()
    raise UnavailableError(f"{retry.address}: the server ended the call early")


async def within(stream: AsyncIterable[Message], answer_s: float, address: str) -> AsyncGenerator[Message, None]:
    """The messages of a stream.

    Raises:
        UnavailableError: none came for `answer_s` seconds.
    """
    messages = aiter(stream)
    while True:
        try:
            async with asyncio.timeout(answer_s if answer_s < math.inf else None):
                message = await anext(messages)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise silent(address, answer_s) from None
        yield message


def silent(address: str, answer_s: float) -> UnavailableError:
    """What is said of a server that has taken a call and does not answer it."""
    return UnavailableError(f"{address}: no answer came", field="teacher.answer_s", value=f"{answer_s:g}")
