"""A chunk of an answer as it travels, its tensors copied once.

In: rows of an answer; out: a serialised `ScoreDown`, byte for byte what protobuf makes of the same message. Protobuf copies each tensor three
times: into bytes, into the message, into the serialised one (docs/log.md has what that cost). Only the frames around the data are written here (protobuf's encoding guide: tag, length, content); everything in them is serialised by protobuf.
"""

from __future__ import annotations

from collections.abc import Mapping

from teacher_wire.core import tensor_codec
from teacher_wire.core.tensor import Tensor
from teacher_wire.v2 import teacher_pb2 as pb

_LENGTH_DELIMITED = 2


def _tag(message: type, field: str) -> bytes:
    """Before a field with a length; all of ours are below 16, so that it is one byte."""
    number: int = message.DESCRIPTOR.fields_by_name[field].number  # type: ignore[attr-defined]
    return bytes([number << 3 | _LENGTH_DELIMITED])


_CHUNK, _TENSORS = _tag(pb.ScoreDown, "chunk"), _tag(pb.ScoreChunk, "tensors")
_TENSOR, _DATA = _tag(pb.NamedTensor, "tensor"), _tag(pb.Tensor, "data")


def write_chunk(head: pb.ScoreChunk, tensors: Mapping[str, Tensor], axes: Mapping[str, pb.Axis]) -> bytes:
    """A `ScoreDown` with a chunk.

    Args:
        head: all of the chunk but its tensors.
        tensors: by the name that they have on the wire.
        axes: what the first axis of each counts.
    """
    begin = head.SerializeToString()
    parts: list[bytes | memoryview] = [begin]
    size = len(begin)
    for name, tensor in tensors.items():
        data = tensor_codec.data_of(tensor)
        inner = tensor_codec.header(tensor).SerializeToString()
        if data.nbytes:  # an empty field is left out
            inner += _DATA + _varint(data.nbytes)
        tensor_bytes = len(inner) + data.nbytes
        outer = pb.NamedTensor(name=name, axis=axes[name]).SerializeToString() + _TENSOR + _varint(tensor_bytes)
        frame = _TENSORS + _varint(len(outer) + tensor_bytes) + outer + inner
        parts += [frame, data.data]
        size += len(frame) + data.nbytes
    return b"".join([_CHUNK + _varint(size), *parts])


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; the top bit says that more follow."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
