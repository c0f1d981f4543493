"""The student's half of Generate: one call after another until every sample is there, none of them twice.

In: a call; out: its samples. A call that breaks is made again without what has arrived.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import grpc

from teacher_wire.core.errors import TeacherWireError, UnavailableError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.generate import codec
from teacher_wire.generate.messages import GenerateCall, Sample, check_generate
from teacher_wire.transport import status_table
from teacher_wire.transport.retry import Patience, Retry, within
from teacher_wire.v2 import teacher_pb2_grpc as pb_grpc


async def samples(
    stub: pb_grpc.TeacherStub, metadata: Any, call: GenerateCall, info: TeacherInfo, retry: Retry
) -> AsyncGenerator[Sample, None]:
    """See `TeacherClient.generate`."""
    check_generate(call, info)
    received = set(call.have)
    patience = Patience(retry)
    while True:
        try:
            async with contextlib.aclosing(_one_call(stub, metadata, call, info, received, retry)) as arriving:
                async for sample in arriving:
                    patience.progressed()
                    yield sample
            return
        except TeacherWireError as problem:
            if len(received) == call.prompts.prompts * call.spec.samples and isinstance(
                problem, status_table.RETRYABLE
            ):
                return  # only the word that this was all got lost
            await patience.after(problem)
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
        raise retry.problem(error) from None
    finally:
        stream.cancel()
    raise UnavailableError(f"{retry.address}: the server ended the call early")
