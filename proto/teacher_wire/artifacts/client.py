"""The student's half of Artifact: one call after another until all bytes are there, none of them twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from teacher_wire.artifacts.codec import ArtifactAssembly, encode_request
from teacher_wire.artifacts.messages import Artifact, ArtifactCall
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.core.info import ArtifactInfo, TeacherInfo
from teacher_wire.transport.retry import Patience, Retry, within
from teacher_wire.v2 import teacher_pb2_grpc as pb_grpc

Progress = Callable[[int, int], None]


async def fetch(
    stub: Callable[[], pb_grpc.TeacherStub],
    metadata: Any,
    info: TeacherInfo,
    wanted: ArtifactInfo,
    retry: Retry,
    progress: Progress | None,
    timeout_s: float,
) -> Artifact:
    """See `TeacherClient.artifact`. `stub` is asked for each call: the client may have turned to another edge."""
    artifact, patience = ArtifactAssembly(info, wanted), Patience(retry)
    while True:
        before = artifact.received_bytes
        try:
            await _one_call(stub(), metadata, info, artifact, wanted, retry, progress, timeout_s)
            break
        except TeacherWireError as problem:
            if artifact.received_bytes > before:
                patience.progressed()
            await patience.after(problem)
    return await asyncio.to_thread(artifact.whole)


async def _one_call(
    stub: pb_grpc.TeacherStub,
    metadata: Any,
    info: TeacherInfo,
    artifact: ArtifactAssembly,
    wanted: ArtifactInfo,
    retry: Retry,
    progress: Progress | None,
    timeout_s: float,
) -> None:
    call = ArtifactCall(info.name, info.fingerprint, wanted.kind, wanted.sha256)
    stream = stub.Artifact(encode_request(call, artifact.received_bytes, timeout_s), metadata=metadata)
    try:
        async for chunk in within(stream, retry.answer_s, retry.address):
            artifact.take(chunk)
            if progress and not chunk.HasField("header"):
                progress(artifact.received_bytes, wanted.bytes)
    except grpc.RpcError as error:
        raise retry.problem(error) from None
    finally:
        stream.cancel()
