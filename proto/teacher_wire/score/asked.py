"""A request for labels as it arrived: bytes understood, and the name by which its reply is kept.

In: serialised ScoreUp messages, whole or joined from parts; out: a call, or why it is none. Runs in threads where messages are long.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field

import numpy as np

from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import RequestError, TeacherWireError
from teacher_wire.core.parsing import parse
from teacher_wire.score import codec
from teacher_wire.v2 import teacher_pb2 as pb


@dataclass(frozen=True)
class Asked:
    """A request as it was understood; `problem` if it is none.

    Attributes:
        key: by which its reply is kept. Empty until the reply is there if nothing is to be hashed before it: then no reply is looked for.
    """

    request_id: str
    call: ScoreCall | None
    key: str
    reply_id: int
    next_chunk: int
    problem: TeacherWireError | None


@dataclass
class Parts:
    """A request of which parts have come; `size` bytes in all are announced and counted.

    They are joined once all are there: one buffer that grows leaves holes of every size behind it in the heap. Short ones
    are joined at once, so that what holds them takes no more than they do.
    """

    size: int
    timer: asyncio.TimerHandle
    data: list[bytearray] = field(default_factory=list)
    received: int = 0


def walked_bytes(call: ScoreCall) -> int:
    """Bytes that checking a call walks, or so."""
    batch = call.batch
    return batch.token_ids_T.nbytes + (0 if batch.extra_ids_NM is None else batch.extra_ids_NM.nbytes)


def understand(data: bytes, tenant: str) -> tuple[pb.ScoreUp, Asked | None]:
    """A message up, and if it is a request the call that it is."""
    up = parse(pb.ScoreUp, data)
    if up.WhichOneof("message") != "request":
        return up, None
    return pb.ScoreUp(), _decoded(up.request, tenant)


def understand_parts(parts: list[bytearray], tenant: str, request_id: str) -> Asked:
    """A request that came in parts under this id; they are taken out of the list, since each copy counts."""
    data = b"".join(parts)
    parts.clear()
    try:
        request = parse(pb.ScoreRequest, data)
        del data
        if request.request_id != request_id:
            raise RequestError("the parts were of another id", field="request_id", value=request_id)
    except RequestError as error:
        return Asked(request_id, None, "", 0, 0, error)
    return _decoded(request, tenant)


def _decoded(request: pb.ScoreRequest, tenant: str) -> Asked:
    resume = request.resume
    try:
        call = codec.decode_call(request, tenant)
    except TeacherWireError as error:
        return Asked(request.request_id, None, "", 0, 0, error)
    resumes = request.HasField("resume")
    key = content_key(call) if resumes or call.cache == "shared" else ""
    return Asked(call.request_id, call, key, resume.reply_id if resumes else 0, resume.next_chunk, None)


def content_key(call: ScoreCall) -> str:
    """Names a reply by who asked and everything that was asked: no id can be guessed to get another's labels."""
    digest = hashlib.sha256()
    batch = call.batch
    for text in (call.tenant, call.request_id, call.teacher, call.fingerprint, call.spec.json()):
        digest.update(len(text.encode()).to_bytes(8, "little"))
        digest.update(text.encode())
    for array in (batch.token_ids_T, batch.cu_lengths_B1, batch.wanted_T, batch.extra_ids_NM):
        digest.update((-1 if array is None else array.nbytes).to_bytes(8, "little", signed=True))
        if array is not None:
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
