"""Ragged tensors as bytes: dtype, shape and a little-endian C-order buffer, with every refusal.

In: `tensor.Tensor`; out: `v2.Tensor`, and back. It never trusts a length: a buffer that is not exactly
product(shape) * width bytes is refused. `message.data` copies each time it is read, so it is read once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from teacher_wire.core.errors import TensorError
from teacher_wire.core.tensor import DTYPES, Tensor, pack_uint24, unpack_uint24
from teacher_wire.v2 import teacher_pb2 as pb

MAX_AXES = 4

_CODE = {name: pb.DType.Value(name.upper()) for name in DTYPES}
_NAME = {code: name for name, code in _CODE.items()}


def dtype_code(name: str) -> pb.DType:
    """The wire's number for a dtype name."""
    return _CODE[name]


def dtype_name(code: int, field: str) -> str:
    """The dtype behind a wire number.

    Raises:
        TensorError: the number is not in the contract.
    """
    if code not in _NAME:
        raise TensorError("unknown dtype", field=f"{field}.dtype", value=code, limit=sorted(_NAME))
    return _NAME[code]


def encode(tensor: Tensor) -> pb.Tensor:
    """`tensor` as a message."""
    message = pb.Tensor()
    fill(message, tensor)
    return message


def fill(message: pb.Tensor, tensor: Tensor) -> None:
    """Writes `tensor` into an empty message; in its place within another one it need not be copied there."""
    message.dtype = _CODE[tensor.dtype]
    message.shape.extend(tensor.array.shape)
    message.data = data_of(tensor).tobytes()


def header(tensor: Tensor) -> pb.Tensor:
    """All of `tensor` as a message but its data."""
    return pb.Tensor(dtype=_CODE[tensor.dtype], shape=tensor.array.shape)


def data_of(tensor: Tensor) -> np.ndarray:
    """The bytes that travel, little-endian and contiguous; the tensor's own where it lies so."""
    if tensor.dtype == "uint24":
        return pack_uint24(tensor.array)
    return np.ascontiguousarray(tensor.array, dtype=tensor.array.dtype.newbyteorder("<"))


def decode(message: pb.Tensor, field: str) -> Tensor:
    """The tensor in `message`; read-only where it is not copied, as all but uint24 are.

    Args:
        message: what arrived.
        field: its name, for the error.

    Raises:
        TensorError: unknown dtype, too many axes, or a byte count that does not fit the shape.
    """
    name, shape, data = _checked(message, field)
    if name == "uint24":
        ids = np.empty(shape, np.uint32)
        unpack_uint24(data, ids)
        return Tensor(name, ids)
    return Tensor(name, _values(name, data).reshape(shape).view(DTYPES[name][0]))


def decode_into(message: pb.Tensor, field: str, out: Tensor) -> int:
    """Writes the tensor in `message` into `out` (contiguous); the bytes it took on the wire.

    Args:
        message: what arrived.
        field: its name, for the error.
        out: of the shape and dtype that it must have.

    Raises:
        TensorError: as `decode`, or it has another shape or dtype.
    """
    name, shape, data = _checked(message, field)
    if (shape, name) != (out.shape, out.dtype):
        raise TensorError("wrong shape or dtype", field=field, value=(shape, name), limit=(out.shape, out.dtype))
    if name == "uint24":
        unpack_uint24(data, out.array)
    else:
        out.array.reshape(-1)[:] = _values(name, data)
    return len(data)


def of_bytes(name: str, shape: tuple[int, ...], data: np.ndarray) -> Tensor:
    """The tensor in bytes as they travelled (uint8 [n], of the right number), without a copy; not of uint24."""
    return Tensor(name, data.view(np.dtype(DTYPES[name][0]).newbyteorder("<")).reshape(shape).view(DTYPES[name][0]))


def countable(shape: Sequence[int]) -> bool:
    """Whether numpy can hold such a shape: it counts the axes' product without those of 0, so that an empty one can be too long."""
    return len(shape) <= MAX_AXES and math.prod(axis or 1 for axis in shape) < 1 << 40


def _values(name: str, data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.dtype(DTYPES[name][0]).newbyteorder("<"))


def _checked(message: pb.Tensor, field: str) -> tuple[str, tuple[int, ...], bytes]:
    """Name of the dtype, shape and bytes of a tensor whose bytes fit its shape."""
    name = dtype_name(message.dtype, field)
    if len(message.shape) > MAX_AXES:  # before it is walked: a message may hold a million
        raise TensorError("too many axes", field=f"{field}.shape", value=len(message.shape), limit=MAX_AXES)
    shape = tuple(message.shape)
    expected = math.prod(shape) * DTYPES[name][1]  # Python ints: no overflow to hide in
    if not countable(shape):
        raise TensorError("axes too long", field=f"{field}.shape", value=list(shape), limit="2^40")
    data = message.data
    if expected != len(data):
        raise TensorError(
            f"{name}{list(shape)} takes {expected} bytes", field=f"{field}.data", value=len(data), limit=expected
        )
    return name, shape, data
