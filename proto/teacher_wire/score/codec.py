"""The only mapper between the house's messages and the generated protocol classes.

Encoding trusts its own side; decoding checks everything that the other machine could have got
wrong and raises a RequestError (towards a server) or a LabelError (towards a student).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

import numpy as np

from teacher_wire import PROTOCOL
from teacher_wire.core import tensor_codec
from teacher_wire.core.axes import Axis, Entries, axis_of
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import Cache, Latency, ScoreCall
from teacher_wire.core.errors import CapabilityError, LabelError, LimitError, MismatchError, RequestError, TensorError
from teacher_wire.core.info import ArtifactInfo, Limits, TeacherInfo
from teacher_wire.core.parsing import check_names, check_request_id
from teacher_wire.core.signals import TeacherSignals, Timing
from teacher_wire.core.tensor import FLOATS, Tensor
from teacher_wire.score.assembly import Assembly
from teacher_wire.score.chunk_writer import write_chunk
from teacher_wire.score.signals.wire import decode_spec, encode_spec
from teacher_wire.v2 import teacher_pb2 as pb

Choice = TypeVar("Choice", bound=str)

CHUNK_BYTES = 1 << 20
PART_BYTES = 1 << 20  # of a request that is sent in parts

_AXIS_CODE = {axis: pb.Axis.Value(axis.name) for axis in Axis}
_CACHE_CODE: dict[Cache, pb.Cache] = {"shared": pb.CACHE_SHARED, "none": pb.CACHE_NONE}
_LATENCY_CODE: dict[Latency, pb.Latency] = {"bulk": pb.LATENCY_BULK, "interactive": pb.LATENCY_INTERACTIVE}


# ------------------------------------------------------------------ describe


def encode_description(teachers: list[TeacherInfo], server_version: str) -> pb.DescribeReply:
    """What Describe answers."""
    return pb.DescribeReply(
        protocol=PROTOCOL, server_version=server_version, teachers=[_encode_info(info) for info in teachers]
    )


def decode_description(reply: pb.DescribeReply) -> list[TeacherInfo]:
    """The teachers behind an address.

    Raises:
        CapabilityError: the server speaks another version of the contract.
    """
    if reply.protocol != PROTOCOL:
        raise CapabilityError(
            "the server speaks another protocol version", field="protocol", value=reply.protocol, limit=PROTOCOL
        )
    return [_decode_info(info) for info in reply.teachers]


def _encode_info(info: TeacherInfo) -> pb.TeacherInfo:
    values = {name: getattr(info, name) for name in _INFO_FIELDS}
    values["artifacts"] = [pb.ArtifactInfo(**vars(artifact)) for artifact in info.artifacts]
    return pb.TeacherInfo(**values, limits=pb.Limits(**{name: getattr(info.limits, name) for name in _LIMIT_FIELDS}))


def _decode_info(info: pb.TeacherInfo) -> TeacherInfo:
    if info.dtype not in FLOATS:
        raise LabelError("unknown dtype of a teacher", field="dtype", value=info.dtype, limit="|".join(FLOATS))
    values = {name: getattr(info, name) for name in _INFO_FIELDS}
    values |= {name: tuple(values[name]) for name in ("transports", "generates", "basis_layers")}
    values["artifacts"] = tuple(ArtifactInfo(told.kind, told.sha256, told.bytes) for told in info.artifacts)
    return TeacherInfo(**values, limits=Limits(**{name: getattr(info.limits, name) for name in _LIMIT_FIELDS}))


_INFO_FIELDS = [f.name for f in pb.TeacherInfo.DESCRIPTOR.fields if f.name != "limits"]
_LIMIT_FIELDS = [f.name for f in pb.Limits.DESCRIPTOR.fields]


# ------------------------------------------------------------------- request


def request_messages(request: pb.ScoreRequest) -> Iterator[pb.ScoreUp]:
    """A request on its way up: one message, or parts if it is long."""
    if request.ByteSize() <= PART_BYTES:
        yield pb.ScoreUp(request=request)
        return
    data = request.SerializeToString()
    for offset in range(0, len(data), PART_BYTES):
        part = pb.RequestPart(request_id=request.request_id, total_bytes=len(data), offset=offset)
        part.data = data[offset : offset + PART_BYTES]
        yield pb.ScoreUp(part=part)


def encode_call(call: ScoreCall) -> pb.ScoreRequest:
    """A request on its way up."""
    batch = call.batch
    return pb.ScoreRequest(
        request_id=call.request_id,
        teacher=call.teacher,
        fingerprint=call.fingerprint,
        spec=encode_spec(call.spec),
        token_ids=tensor_codec.encode(Tensor("int32", batch.token_ids_T)),
        cu_lengths=tensor_codec.encode(Tensor("int32", batch.cu_lengths_B1)),
        wanted=tensor_codec.encode(Tensor("uint8", batch.wanted_T.view(np.uint8))),
        timeout_ms=round(call.timeout_s * 1000),
        extra_ids=None if batch.extra_ids_NM is None else tensor_codec.encode(Tensor("int32", batch.extra_ids_NM)),
        cache=_CACHE_CODE[call.cache],
        latency=_LATENCY_CODE[call.latency],
    )


def decode_call(request: pb.ScoreRequest, tenant: str) -> ScoreCall:
    """A request that arrived, checked for form (not against a teacher: see `check_call`).

    Raises:
        RequestError: naming the field.
    """
    check_request_id(request.request_id)
    check_names(request, "teacher", "fingerprint")
    spec = decode_spec(request.spec)
    wanted = _decode_as(request.wanted, "wanted", "uint8")
    if wanted.size and wanted.max() > 1:
        raise RequestError("flags are 0 or 1", field="wanted", value=int(wanted.max()), limit=1)
    batch = TokenBatch(
        token_ids_T=_decode_as(request.token_ids, "token_ids", "int32"),
        cu_lengths_B1=_decode_as(request.cu_lengths, "cu_lengths", "int32"),
        wanted_T=wanted.view(np.bool_),
        extra_ids_NM=_decode_as(request.extra_ids, "extra_ids", "int32") if request.HasField("extra_ids") else None,
    )
    return ScoreCall(
        request_id=request.request_id,
        teacher=request.teacher,
        fingerprint=request.fingerprint,
        spec=spec,
        batch=batch,
        timeout_s=request.timeout_ms / 1000,
        tenant=tenant,
        cache=_decode_choice(request.cache, "cache", _CACHE_CODE),
        latency=_decode_choice(request.latency, "latency", _LATENCY_CODE),
    )


def _decode_choice(code: int, field: str, codes: Mapping[Choice, int]) -> Choice:
    for name, known in codes.items():
        if code == known:
            return name
    raise RequestError("a value that this server does not know", field=field, value=code, limit="|".join(codes))


def _decode_as(message: pb.Tensor, field: str, dtype: str) -> np.ndarray:
    tensor = tensor_codec.decode(message, field)
    if tensor.dtype != dtype:
        raise TensorError("wrong dtype", field=field, value=tensor.dtype, limit=dtype)
    return tensor.array


def reply_bytes(call: ScoreCall, info: TeacherInfo) -> int:
    """Payload bytes that the answer to `call` takes on the wire."""
    return call.spec.answer_bytes(call.batch, call.spec.shape_of(info))


def check_call(call: ScoreCall, info: TeacherInfo) -> int:
    """Refuses a request that this teacher cannot answer, before any work is done for it; its `reply_bytes`.

    Raises:
        MismatchError: another teacher was meant.
        CapabilityError: a signal is not offered.
        RequestError, LimitError: naming field, value and limit.
    """
    batch, spec, limits = call.batch, call.spec, info.limits
    if call.fingerprint and call.fingerprint != info.fingerprint:
        raise MismatchError(
            f"teacher {info.name!r} has other weights than the request expects",
            field="fingerprint", value=info.fingerprint, limit=call.fingerprint,
        )  # fmt: skip
    for signal in spec.signals:
        if signal.kind not in info.transports:
            raise CapabilityError(
                f"teacher {info.name!r} does not give this signal",
                field="signal", value=signal.kind, limit="|".join(info.transports),
            )  # fmt: skip
        signal.check_teacher(info)
    if spec.vocab_rows > info.vocab_rows:
        raise RequestError(
            "above the teacher's vocabulary", field="vocab_rows", value=spec.vocab_rows, limit=info.vocab_rows
        )
    longest, needed = int(np.argmax(batch.lengths_B)), reply_bytes(call, info)
    for field, value, limit in (
        (f"sequence {longest} tokens", int(batch.lengths_B[longest]), limits.max_sequence_tokens),
        ("request tokens", batch.tokens, limits.max_request_tokens),
        ("request sequences", batch.sequences, limits.max_request_sequences),
        ("reply bytes", needed, limits.max_reply_bytes),
    ):
        if value > limit:
            raise LimitError(f"above the limit of teacher {info.name!r}", field=field, value=value, limit=limit)
    top = int(np.argmax(batch.token_ids_T))
    if batch.token_ids_T[top] >= info.vocab_rows:
        raise RequestError(
            "token id outside the teacher's vocabulary",
            field=f"token_ids[{top}]",
            value=int(batch.token_ids_T[top]),
            limit=info.vocab_rows - 1,
        )
    named = 0 if batch.extra_ids_NM is None else batch.extra_ids_NM.shape[1]
    if named != spec.extra_ids:
        raise RequestError("extra_ids do not fit the spec", field="extra_ids", value=named, limit=spec.extra_ids)
    if batch.extra_ids_NM is not None and batch.extra_ids_NM.max() >= spec.vocab_rows:
        raise RequestError(
            "id outside vocab_rows", field="extra_ids", value=int(batch.extra_ids_NM.max()), limit=spec.vocab_rows - 1
        )
    labels = batch.labels_N()
    worst = int(np.argmax(labels))
    if labels[worst] >= spec.vocab_rows:
        raise RequestError(
            "label outside vocab_rows",
            field=f"label of row {worst}",
            value=int(labels[worst]),
            limit=spec.vocab_rows - 1,
        )
    return needed


# --------------------------------------------------------------------- reply


def encode_chunks(
    call: ScoreCall, reply_id: int, signals: TeacherSignals, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[bytes, int]]:
    """The answer to `call` as chunks of whole rows, about `chunk_bytes` of payload each, as they travel (`ScoreDown`), each with
    its payload bytes."""
    entries = Entries(call.batch)
    axes = {name: _AXIS_CODE[axis_of(name)] for name in signals.tensors}
    for index, (start, stop) in enumerate(_spans(entries, signals, call.batch.rows, chunk_bytes)):
        head = pb.ScoreChunk(
            request_id=call.request_id, reply_id=reply_id, index=index, first_row=start, rows=stop - start
        )
        tensors = signals.slice(entries, start, stop).tensors
        yield write_chunk(head, tensors, axes), sum(tensor.payload_bytes for tensor in tensors.values())


def _spans(entries: Entries, signals: TeacherSignals, rows: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """First and last row of each chunk: as many rows as fit into `chunk_bytes`, at least one."""
    before = np.zeros(rows + 1, np.int64)  # payload bytes of the rows before each row
    for name, tensor in signals.tensors.items():
        before += entries.before(axis_of(name)) * (tensor.payload_bytes // max(1, tensor.shape[0]))
    start = 0
    while start < rows:
        fitting = int(np.searchsorted(before, before[start] + chunk_bytes, side="right")) - 1
        stop = min(max(fitting, start + 1), rows)
        yield start, stop
        start = stop


def payload_bytes(chunk: pb.ScoreChunk) -> int:
    """Payload of a chunk, the unit of credits, whatever it holds; copies it once."""
    return sum(len(named.tensor.data) for named in chunk.tensors)


def decode_chunk(chunk: pb.ScoreChunk, answer: Assembly) -> int:
    """Writes a chunk into the answer that it continues; its payload bytes. Dtypes and widths must be what was asked.

    Raises:
        LabelError: something is missing, superfluous, of another type or width, out of order or more than was asked.
            The answer is then good for nothing.
    """
    if chunk.index != answer.chunks or chunk.first_row != answer.rows:
        raise LabelError("chunks out of order", field="chunk.index", value=chunk.index, limit=answer.chunks)
    found = {named.name: named for named in chunk.tensors}
    if found.keys() != answer.names or len(found) < len(chunk.tensors):
        raise LabelError(
            "the answer holds other tensors than asked",
            field="chunk",
            value=sorted(named.name for named in chunk.tensors),
            limit=sorted(answer.names),
        )
    payload = 0
    for name, room in answer.room(chunk.rows).items():
        named = found[name]
        if named.axis != _AXIS_CODE[axis_of(name)]:
            raise LabelError("another axis than its name says", field=name, value=named.axis, limit=axis_of(name))
        try:
            payload += tensor_codec.decode_into(named.tensor, name, room)
        except TensorError as error:
            raise LabelError(error.message, field=error.field, value=error.value, limit=error.limit) from error
    answer.took(chunk.rows)
    return payload


def encode_timing(timing: Timing) -> pb.Timing:
    """Server-side times of one request."""
    return pb.Timing(
        queue_us=timing.queue_us,
        forward_us=timing.forward_us,
        reduce_us=timing.reduce_us,
        batch_tokens=timing.batch_tokens,
    )


def finish_reply(answer: Assembly, done: pb.ScoreDone, call: ScoreCall) -> TeacherSignals:
    """The whole answer, whose chunks have come.

    Raises:
        LabelError: rows are missing, or another teacher answered.
    """
    rows = answer.rows
    if rows != done.rows or rows != call.batch.rows or answer.chunks != done.chunks:
        raise LabelError("the answer is incomplete", field="rows", value=rows, limit=call.batch.rows)
    if call.fingerprint and done.fingerprint != call.fingerprint:
        raise LabelError(
            "another teacher answered", field="fingerprint", value=done.fingerprint, limit=call.fingerprint
        )
    timing = Timing(done.timing.queue_us, done.timing.forward_us, done.timing.reduce_us, done.timing.batch_tokens)
    return TeacherSignals(answer.whole(), done.fingerprint, timing)
