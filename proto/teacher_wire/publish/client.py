"""The student's half of Publish: one call after another until the revision is live, no byte sent twice that the server still has."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from teacher_wire.core.errors import LabelError, TeacherWireError, UnavailableError
from teacher_wire.publish import codec
from teacher_wire.publish.messages import SHA256, Publication
from teacher_wire.transport.retry import Patience, Retry, silent
from teacher_wire.v2 import teacher_pb2 as pb
from teacher_wire.v2 import teacher_pb2_grpc as pb_grpc

Progress = Callable[[str, int, int], None]


async def publish(
    stub: Callable[[], pb_grpc.TeacherStub],
    metadata: Any,
    publication: Publication,
    sources: Sequence[Path],
    retry: Retry,
    progress: Progress | None,
) -> str:
    """See `TeacherClient.publish`. `stub` is asked for each call: the client may have turned to another edge."""
    patience, most = Patience(retry), -1
    while True:
        call = _Call(stub().Publish(metadata=metadata), publication, retry, progress)
        try:
            return await call.run(sources)
        except TeacherWireError as problem:
            if call.arrived > most:  # the server holds more than after any call before
                patience.progressed()
            most = max(most, call.arrived)
            await patience.after(problem)


class _Call:
    """One call.

    Attributes:
        arrived: bytes that the server said it held at its start; -1 before it said so.
    """

    def __init__(self, stream: Any, publication: Publication, retry: Retry, progress: Progress | None) -> None:
        self._stream = stream
        self._publication = publication
        self._retry = retry
        self._progress = progress or (lambda stage, sent, whole: None)
        self.arrived = -1

    async def run(self, sources: Sequence[Path]) -> str:
        """The fingerprint of the live revision."""
        try:
            return await self._run(sources)
        except grpc.RpcError as error:
            raise self._retry.problem(error) from None
        finally:
            self._stream.cancel()

    async def _run(self, sources: Sequence[Path]) -> str:
        await self._write(codec.encode_open(self._publication))
        have = codec.decode_have(await self._read(), self._publication)
        if self._publication.check_only:
            return ""
        self.arrived = sum(have)
        sent, whole = self.arrived, self._publication.bytes
        for number, (path, offset) in enumerate(zip(sources, have, strict=True)):
            size = self._publication.files[number].bytes
            with path.open("rb") as file:
                file.seek(offset)
                while offset < size:
                    data = await asyncio.to_thread(file.read, min(codec.PIECE_BYTES, size - offset))
                    if not data:
                        raise LabelError(
                            "a file became shorter while it was sent", field="files", value=path.name, limit=size
                        )
                    await self._write(codec.encode_piece(number, offset, data))
                    offset += len(data)
                    sent += len(data)
                    self._progress("sending", sent, whole)
        await self._stream.done_writing()
        while True:
            down = await self._read()
            if down.stage == codec.LIVE:
                if not SHA256.fullmatch(down.fingerprint) or down.revision != self._publication.revision:
                    raise LabelError("another revision went live", field="revision", value=down.revision[:64])
                return str(down.fingerprint)
            self._progress(down.message or "checking", whole, whole)

    async def _write(self, message: pb.PublishUp) -> None:
        """Sends a message; what the server said against it is raised by reading."""
        try:
            async with self._patient():
                await self._stream.write(message)
        except asyncio.InvalidStateError:  # the call has ended: why, its status says
            await self._read()
            raise UnavailableError(f"{self._retry.address}: the server ended the call early") from None
        except TimeoutError:
            raise silent(self._retry.address, self._retry.answer_s) from None

    async def _read(self) -> pb.PublishDown:
        try:
            async with self._patient():
                down: pb.PublishDown = await self._stream.read()
        except TimeoutError:
            raise silent(self._retry.address, self._retry.answer_s) from None
        if down is grpc.aio.EOF:
            raise UnavailableError(f"{self._retry.address}: the server ended the call early")
        return down

    def _patient(self) -> asyncio.Timeout:
        answer_s = self._retry.answer_s
        return asyncio.timeout(answer_s if answer_s < math.inf else None)
