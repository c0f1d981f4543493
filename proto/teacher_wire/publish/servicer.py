"""The server half of Publish: a revision piece by piece, then word of how its deployment goes.

In: messages as bytes; out: messages as bytes. One piece is held at a time: the next is read when the last is on its way to the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Protocol

from teacher_wire.core.errors import DeadlineError, RequestError, UnavailableError
from teacher_wire.core.parsing import parse
from teacher_wire.publish import codec
from teacher_wire.publish.messages import Publication
from teacher_wire.v2 import teacher_pb2 as pb


class Incoming(Protocol):
    """A revision that is being received. Only one call at a time has it."""

    have: tuple[int, ...]  # bytes of each file that are there

    async def write(self, file: int, data: bytes) -> None:
        """Adds to file number `file`, whose earlier bytes and files are there."""

    async def finish(self) -> None:
        """Checks all of it and orders its deployment; refused with the errors that the proto names."""

    async def deployed(self, tell: Callable[[str], Awaitable[None]]) -> str:
        """The fingerprint of the teacher, once it is live; until then `tell` hears how it goes, every few seconds at least.

        Raises:
            ServerError: it cannot come up.
        """


class PublishService(Protocol):
    """What takes revisions."""

    async def check(self, publication: Publication) -> None:
        """Refuses what `receive` would refuse, as far as it shows before a byte has come."""

    def receive(self, publication: Publication) -> contextlib.AbstractAsyncContextManager[Incoming]:
        """Lets a tenant begin, or refuses; what came of it is kept for a later call, unless it is refused."""


async def serve(
    service: PublishService,
    first: bytes,
    read: Callable[[], Awaitable[bytes | None]],
    send: Callable[[bytes], Awaitable[None]],
    tenant: str,
    stall_s: float,
) -> None:
    """Answers one call.

    Args:
        service: takes the revision.
        first: the serialised first message.
        read: the next one; None when there are no more.
        send: takes a message down.
        tenant: who publishes.
        stall_s: how long the next piece may take.

    Raises:
        TeacherWireError: refused, late or failed.
    """
    publication = codec.decode_open(parse(pb.PublishUp, first), tenant)
    revision = publication.revision
    if publication.check_only:
        await service.check(publication)
        await send(codec.encode_stage(codec.RECEIVING, revision, have=[0] * len(publication.files)))
        return
    try:
        async with asyncio.timeout(publication.timeout_s or None), service.receive(publication) as incoming:
            await send(codec.encode_stage(codec.RECEIVING, revision, have=incoming.have))
            for number, file in enumerate(publication.files):
                offset = incoming.have[number]
                while offset < file.bytes:
                    data = await _piece(read, stall_s, number, offset, file.bytes - offset)
                    await incoming.write(number, data)
                    offset += len(data)
            await send(codec.encode_stage(codec.CHECKING, revision))
            await incoming.finish()

            async def tell(word: str) -> None:
                await send(codec.encode_stage(codec.DEPLOYING, revision, message=word))

            fingerprint = await incoming.deployed(tell)
            await send(codec.encode_stage(codec.LIVE, revision, fingerprint=fingerprint))
    except TimeoutError:
        raise DeadlineError(
            "not live in time", field="timeout_s", value=publication.teacher, limit=publication.timeout_s
        ) from None


async def _piece(
    read: Callable[[], Awaitable[bytes | None]], stall_s: float, file: int, offset: int, size: int
) -> bytes:
    try:
        async with asyncio.timeout(stall_s):
            data = await read()
    except TimeoutError:
        raise UnavailableError("the next piece did not come in time", field="stall_s", limit=stall_s) from None
    if data is None:
        raise RequestError(
            "the files are not whole",
            field="data",
            value=f"ends in file {file} at {offset}",
            limit=f"{size} bytes more",
        )
    return codec.decode_piece(parse(pb.PublishUp, data), file, offset, size)
