"""Ragged tensors as bytes: dtype, shape and a little-endian C-order buffer, with every refusal.

In: `messages.Tensor`; out: `v1.Tensor`, and back. Decoding never copies a float or int32 tensor
and never trusts a length: a buffer that is not exactly product(shape) * width bytes is refused.
"""

from __future__ import annotations

import math

import numpy as np

from teacher_wire.errors import TensorError
from teacher_wire.messages import DTYPES, Tensor
from teacher_wire.v1 import teacher_pb2 as pb

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
    """`tensor` as a message; one copy."""
    array = tensor.array
    if tensor.dtype == "uint24":
        wide = np.ascontiguousarray(array, dtype="<u4")
        data = wide.view(np.uint8).reshape(*array.shape, 4)[..., :3].tobytes()
    else:
        data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return pb.Tensor(dtype=_CODE[tensor.dtype], shape=array.shape, data=data)


def decode(message: pb.Tensor, field: str) -> Tensor:
    """The tensor in `message`; read-only, sharing its buffer where the type allows.

    Args:
        message: what arrived.
        field: its name, for the error.

    Raises:
        TensorError: unknown dtype, too many axes, or a byte count that does not fit the shape.
    """
    name = dtype_name(message.dtype, field)
    shape = tuple(message.shape)
    if len(shape) > MAX_AXES:
        raise TensorError("too many axes", field=f"{field}.shape", value=len(shape), limit=MAX_AXES)
    width = DTYPES[name][1]
    expected = math.prod(shape) * width  # Python ints: no overflow to hide in
    if any(axis >= 1 << 40 for axis in shape):  # empty, and yet more than numpy can count
        raise TensorError("axis too long", field=f"{field}.shape", value=list(shape), limit="2^40")
    if expected != len(message.data):
        raise TensorError(
            f"{name}{list(shape)} takes {expected} bytes",
            field=f"{field}.data",
            value=len(message.data),
            limit=expected,
        )
    if name == "uint24":
        wide = np.zeros((*shape, 4), np.uint8)
        wide[..., :3] = np.frombuffer(message.data, np.uint8).reshape(*shape, 3)
        return Tensor(name, wide.view("<u4").reshape(shape))
    numpy_dtype = np.dtype(DTYPES[name][0]).newbyteorder("<")
    return Tensor(name, np.frombuffer(message.data, numpy_dtype).reshape(shape).view(DTYPES[name][0]))
