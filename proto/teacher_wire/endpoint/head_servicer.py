"""The server half of Head: the output head in slices, from wherever the student's last call broke.

In: a request; out: serialised chunks, each made when the one before it was taken, so that no head is held twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable

from teacher_wire.core.errors import DeadlineError, RequestError
from teacher_wire.core.parsing import check_names, parse
from teacher_wire.endpoint.service import TeacherService
from teacher_wire.score import codec
from teacher_wire.v2 import teacher_pb2 as pb


async def chunks(service: TeacherService, data: bytes, charge: Callable[[int], None]) -> AsyncGenerator[bytes, None]:
    """Everything to be sent down.

    Args:
        service: has the head.
        data: a serialised HeadRequest.
        charge: told of the bytes of each slice before it is sent; may raise an OverloadedError.

    Raises:
        TeacherWireError: refused, over a quota, late or failed.
    """
    request = parse(pb.HeadRequest, data)
    check_names(request, "teacher", "fingerprint")
    timeout_s, started_s = request.timeout_ms / 1000, time.monotonic()
    # Slices may come from several replicas: they must be of the same weights.
    fingerprint = request.fingerprint or (await service.info(request.teacher)).fingerprint
    sent = request.offset
    try:
        async with asyncio.timeout(timeout_s or None):
            header = await service.head_header(request.teacher, fingerprint)
        if sent > header.weight_bytes:
            raise RequestError("beyond the head", field="offset", value=sent, limit=header.weight_bytes)
        yield codec.encode_head_header(header).SerializeToString()
        while sent < header.weight_bytes:
            size = min(codec.CHUNK_BYTES, header.weight_bytes - sent)
            charge(size)
            left_s = timeout_s - (time.monotonic() - started_s) if timeout_s else None
            async with asyncio.timeout(left_s):
                part = await service.head_bytes(request.teacher, fingerprint, sent, size)
            yield pb.HeadChunk(offset=sent, data=part).SerializeToString()
            sent += size
    except TimeoutError:
        raise DeadlineError(
            "the head was not sent in time", field="timeout_s", value=f"{sent} bytes", limit=timeout_s
        ) from None
