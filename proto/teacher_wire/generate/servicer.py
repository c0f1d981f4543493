"""The server half of Generate: a call is checked, handed to the service, and its samples are passed on as they finish.

In: a request; out: messages down. It makes no sample and keeps none: a broken call is taken up by naming what arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Protocol

from teacher_wire.core.errors import DeadlineError, UnavailableError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.parsing import check_names, parse
from teacher_wire.generate import codec as generate_codec
from teacher_wire.generate.messages import GenerateCall, Sample, check_generate
from teacher_wire.transport.offload import Offload
from teacher_wire.v2 import teacher_pb2 as pb

_SCHEMA_COST = 16  # checking a byte of a schema takes as long as checking so many bytes of ids


class Writes(Protocol):
    """The part of a `TeacherService` that answers Generate."""

    async def info(self, teacher: str, fingerprint: str = "") -> TeacherInfo:
        """One teacher, of these weights if it still has them. Raises NotFoundError."""

    def generate(self, call: GenerateCall) -> AsyncIterator[Sample]:
        """Samples as they finish; closing the iterator stops the work."""


async def answers(service: Writes, data: bytes, tenant: str, offload: Offload) -> AsyncGenerator[bytes, None]:
    """Everything to be sent down, serialised.

    Args:
        service: writes.
        data: a serialised GenerateRequest.
        tenant: who calls.
        offload: decodes and checks what is long.

    Raises:
        TeacherWireError: refused, overloaded, late or failed.
    """
    request = await offload.run(tenant, len(data), _parsed, data)
    info = await service.info(request.teacher, request.fingerprint)
    work = len(data) + _SCHEMA_COST * len(request.sampling.json_schema)
    call = await offload.run(tenant, work, _checked, request, tenant, info)
    del request
    sent, started = 0, time.monotonic()
    async with contextlib.aclosing(_closable(service.generate(call))) as samples:
        while True:
            left = call.timeout_s - (time.monotonic() - started) if call.timeout_s else None
            try:
                async with asyncio.timeout(left):
                    sample = await anext(samples, None)
            except TimeoutError:
                raise DeadlineError(
                    "not all samples came in time", field="timeout_s", value=f"{sent} samples", limit=call.timeout_s
                ) from None
            if sample is None:
                break
            sent += 1
            yield generate_codec.encode_sample(sample).SerializeToString()
    if sent != call.samples:
        raise UnavailableError("the server dropped samples", field="samples", value=sent, limit=call.samples)
    yield generate_codec.encode_end(sent, info.fingerprint).SerializeToString()


def _parsed(data: bytes) -> pb.GenerateRequest:
    request = parse(pb.GenerateRequest, data)
    check_names(request, "teacher", "fingerprint")
    return request


def _checked(request: pb.GenerateRequest, tenant: str, info: TeacherInfo) -> GenerateCall:
    call = generate_codec.decode_generate(request, tenant, info.limits)
    check_generate(call, info)
    return call


async def _closable(samples: AsyncIterator[Sample]) -> AsyncGenerator[Sample, None]:
    """An async generator over any iterator, so that it can be closed."""
    try:
        async for sample in samples:
            yield sample
    finally:
        close = getattr(samples, "aclose", None)
        if close is not None:
            await close()
