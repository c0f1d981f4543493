"""Artifacts between messages of the house and the protocol, and their assembly from chunks.

Encoding trusts its own side; decoding refuses with a RequestError (towards a server) or a LabelError (towards a student).
"""

from __future__ import annotations

import numpy as np

from teacher_wire.artifacts.kinds import kind_of
from teacher_wire.artifacts.messages import Artifact, ArtifactCall, ArtifactHeader, TensorHeader
from teacher_wire.core import tensor_codec
from teacher_wire.core.errors import LabelError, RequestError, TensorError
from teacher_wire.core.info import ArtifactInfo, TeacherInfo
from teacher_wire.core.parsing import MAX_ID_CHARS, check_names
from teacher_wire.v2 import teacher_pb2 as pb

CHUNK_BYTES = 1 << 20
MAX_ENTRIES = 4096  # tensors, and numbers, of one artifact


def encode_request(call: ArtifactCall, offset: int, timeout_s: float) -> pb.ArtifactRequest:
    """A call for the payload from `offset` on."""
    return pb.ArtifactRequest(
        teacher=call.teacher, fingerprint=call.fingerprint, kind=call.kind, sha256=call.sha256, offset=offset,
        timeout_ms=round(timeout_s * 1000),
    )  # fmt: skip


def decode_request(request: pb.ArtifactRequest) -> ArtifactCall:
    """What is asked for; its offset is checked against the header.

    Raises:
        RequestError: kind or sha256 is missing, or a name is none.
    """
    check_names(request, "teacher", "fingerprint", "kind", "sha256")
    for field in ("kind", "sha256"):
        if not getattr(request, field):
            raise RequestError("missing: one of the artifacts that Describe lists", field=field)
    return ArtifactCall(request.teacher, request.fingerprint, request.kind, request.sha256)


def encode_header(header: ArtifactHeader) -> pb.ArtifactChunk:
    """The first chunk."""
    message = pb.ArtifactHeader(kind=header.kind, sha256=header.sha256, numbers=header.numbers)
    for tensor in header.tensors:
        message.tensors.add(name=tensor.name, dtype=tensor_codec.dtype_code(tensor.dtype), shape=tensor.shape)
    return pb.ArtifactChunk(header=message)


def decode_header(message: pb.ArtifactHeader) -> ArtifactHeader:
    """The header of an artifact on its way, checked for form.

    Raises:
        LabelError: too many entries, a name twice or none, an unknown dtype, a shape that cannot be.
    """
    if max(len(message.tensors), len(message.numbers)) > MAX_ENTRIES:
        entries = max(len(message.tensors), len(message.numbers))
        raise LabelError("too many entries", field="artifact.header", value=entries, limit=MAX_ENTRIES)
    for name in (*(tensor.name for tensor in message.tensors), *message.numbers):
        if not 0 < len(name) <= MAX_ID_CHARS or not name.isprintable():
            raise LabelError(
                "not a printable name",
                field="artifact.header",
                value=ascii(name[:MAX_ID_CHARS]),
                limit=f"1 to {MAX_ID_CHARS} characters",
            )
    tensors = tuple(_decode_tensor(tensor) for tensor in message.tensors)
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise LabelError("a tensor's name comes twice", field="artifact.tensors")
    return ArtifactHeader(message.kind, message.sha256, tensors, dict(message.numbers))


def _decode_tensor(message: pb.ArtifactTensor) -> TensorHeader:
    name = message.name
    try:
        dtype = tensor_codec.dtype_name(message.dtype, f"artifact.{name}")
    except TensorError as error:
        raise LabelError(error.message, field=error.field, value=error.value, limit=error.limit) from error
    if dtype == "uint24":
        raise LabelError("not a dtype of artifacts", field=f"artifact.{name}.dtype", value=dtype)
    if not tensor_codec.countable(message.shape):
        raise LabelError("a shape that cannot be", field=f"artifact.{name}.shape", value=list(message.shape)[:5])
    return TensorHeader(name, dtype, tuple(message.shape))


class ArtifactAssembly:
    """An artifact while its chunks come, each written to its place; kept over broken calls.

    Args:
        info: the teacher, as described.
        wanted: one of its artifacts.

    Raises:
        CapabilityError: this side does not know artifacts of that kind.

    Attributes:
        received_bytes: of the payload; the offset at which a broken call is taken up.
        header: once it has come.
    """

    def __init__(self, info: TeacherInfo, wanted: ArtifactInfo) -> None:
        self._info = info
        self._wanted = wanted
        self._kind = kind_of(wanted.kind)
        self._room: list[np.ndarray] = []  # uint8, one for each tensor
        self.received_bytes = 0
        self.header: ArtifactHeader | None = None

    def take(self, chunk: pb.ArtifactChunk) -> None:
        """A chunk of the call that began at `received_bytes`; the first one has the header.

        Raises:
            LabelError: not the artifact that was described, chunks out of order, or more bytes than it has.
        """
        if chunk.HasField("header"):
            self._take_header(decode_header(chunk.header))
            return
        if self.header is None or chunk.offset != self.received_bytes:
            raise LabelError(
                "chunks out of order",
                field=f"{self._wanted.kind}.offset",
                value=chunk.offset,
                limit=self.received_bytes,
            )
        data = np.frombuffer(chunk.data, np.uint8)
        if self.received_bytes + data.size > self._wanted.bytes:
            raise LabelError(
                "more bytes than described", field=f"{self._wanted.kind}.data",
                value=self.received_bytes + data.size, limit=self._wanted.bytes,
            )  # fmt: skip
        start = 0
        for room in self._room:
            if self.received_bytes < start + room.size and data.size:
                at = self.received_bytes - start
                part, data = np.split(data, [min(data.size, room.size - at)])
                room[at : at + part.size] = part
                self.received_bytes += part.size
            start += room.size

    def _take_header(self, header: ArtifactHeader) -> None:
        told = ArtifactInfo(header.kind, header.sha256, header.payload_bytes)
        if told != self._wanted or header != (self.header or header):
            raise LabelError("not the artifact that was described", field="artifact", value=told, limit=self._wanted)
        if self.header is None:
            self._kind.check(header, self._info)
            self._room = [np.empty(tensor.payload_bytes, np.uint8) for tensor in header.tensors]
            self.header = header

    def whole(self) -> Artifact:
        """The artifact, its digest checked.

        Raises:
            LabelError: truncated, or its digest is not the announced one.
        """
        header, wanted = self.header, self._wanted
        if header is None:
            raise LabelError("no header", field=f"{wanted.kind}.header")
        if self.received_bytes != wanted.bytes:
            raise LabelError(
                "the artifact is incomplete", field=f"{wanted.kind}.data", value=self.received_bytes, limit=wanted.bytes
            )
        tensors = {
            tensor.name: tensor_codec.of_bytes(tensor.dtype, tensor.shape, room)
            for tensor, room in zip(header.tensors, self._room, strict=True)
        }
        digest = self._kind.sha256(tensors, header.numbers)
        if digest != header.sha256:
            raise LabelError(
                "the content has another digest than announced",
                field=f"{wanted.kind}.sha256", value=digest, limit=header.sha256,
            )  # fmt: skip
        return Artifact(header, tensors)
