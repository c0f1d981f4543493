"""The server half of Artifact: an artifact in slices, from wherever the student's last call broke.

In: a request; out: serialised chunks, each made when the one before it was taken, so that no artifact is held twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Protocol

from teacher_wire.artifacts import codec
from teacher_wire.artifacts.messages import ArtifactCall, ArtifactHeader
from teacher_wire.core.errors import DeadlineError, RequestError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.parsing import parse
from teacher_wire.v2 import teacher_pb2 as pb


class ArtifactService(Protocol):
    """The part of a `TeacherService` that gives artifacts away."""

    async def info(self, teacher: str, fingerprint: str = "") -> TeacherInfo:
        """See `TeacherService.info`."""

    async def artifact_header(self, call: ArtifactCall) -> ArtifactHeader:
        """Names, dtypes, shapes and numbers of an artifact. Raises CapabilityError if the teacher has no such one."""

    async def artifact_bytes(self, call: ArtifactCall, offset: int, size: int) -> bytes:
        """A slice of its payload."""


async def chunks(service: ArtifactService, data: bytes, charge: Callable[[int], None]) -> AsyncGenerator[bytes, None]:
    """Everything to be sent down.

    Args:
        service: has the artifact.
        data: a serialised ArtifactRequest.
        charge: called with the bytes of each slice before it is sent; may raise an OverloadedError.

    Raises:
        TeacherWireError: refused, over a quota, late or failed.
    """
    request = parse(pb.ArtifactRequest, data)
    call = codec.decode_request(request)
    timeout_s, started_s = request.timeout_ms / 1000, time.monotonic()
    if not call.fingerprint:  # slices may come from several replicas: they must be of the same revision
        call = replace(call, fingerprint=(await service.info(call.teacher)).fingerprint)
    sent = request.offset
    try:
        async with asyncio.timeout(timeout_s or None):
            header = await service.artifact_header(call)
        whole = header.payload_bytes
        if sent > whole:
            raise RequestError("beyond the artifact", field="offset", value=sent, limit=whole)
        yield codec.encode_header(header).SerializeToString()
        while sent < whole:
            size = min(codec.CHUNK_BYTES, whole - sent)
            charge(size)
            left_s = timeout_s - (time.monotonic() - started_s) if timeout_s else None
            async with asyncio.timeout(left_s):
                part = await service.artifact_bytes(call, sent, size)
            yield pb.ArtifactChunk(offset=sent, data=part).SerializeToString()
            sent += size
    except TimeoutError:
        raise DeadlineError(
            f"the {call.kind} was not sent in time", field="timeout_s", value=f"{sent} bytes", limit=timeout_s
        ) from None
