"""Chunks written by hand against protobuf's own serialisation of the same message: the oracle is equality of bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_wire.core import tensor_codec
from teacher_wire.core.tensor import DTYPES, Tensor
from teacher_wire.score.chunk_writer import write_chunk
from teacher_wire.v2 import teacher_pb2 as pb

SHAPES = st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple)


def by_protobuf(head, tensors, axes):
    down = pb.ScoreDown(chunk=head)
    for name, tensor in tensors.items():
        named = down.chunk.tensors.add(name=name, axis=axes[name])
        tensor_codec.fill(named.tensor, tensor)
    return down.SerializeToString()


def tensor_of(dtype, shape, seed=0):
    held = np.dtype(DTYPES[dtype][0])
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, held.itemsize), np.uint8)
    array = raw.view(held).reshape(shape)
    return Tensor(dtype, array & held.type(0xFFFFFF) if dtype == "uint24" else array)


@given(
    st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), max_size=4),
    st.text("ab7-", max_size=130), st.integers(0, 2**64 - 1), st.tuples(*[st.integers(0, 2**32 - 1)] * 3), st.integers(0, 2**32),
)  # fmt: skip
def test_the_bytes_are_protobufs(kinds, request_id, reply_id, numbers, seed):
    index, first_row, rows = numbers
    head = pb.ScoreChunk(request_id=request_id, reply_id=reply_id, index=index, first_row=first_row, rows=rows)
    tensors = {f"t{i}_N": tensor_of(dtype, shape, seed) for i, (dtype, shape) in enumerate(kinds)}
    axes = dict(zip(tensors, (1, 2, 4, 0), strict=False))
    assert write_chunk(head, tensors, axes) == by_protobuf(head, tensors, axes)


@pytest.mark.parametrize("size", [127, 128, 129, 16_383, 16_384, 2_097_151, 2_097_152])
def test_lengths_at_which_a_byte_more_is_needed(size):
    head, tensors, axes = pb.ScoreChunk(request_id="r"), {"x_N": tensor_of("uint8", (size,))}, {"x_N": 1}
    assert write_chunk(head, tensors, axes) == by_protobuf(head, tensors, axes)


def test_slices_that_lie_apart_travel_in_order():
    array = np.arange(60, dtype=np.float32).reshape(6, 10)
    tensors, axes = {"x_ND": Tensor("float32", array[:, ::2])}, {"x_ND": 1}
    data = write_chunk(pb.ScoreChunk(), tensors, axes)
    sent = pb.ScoreDown.FromString(data).chunk.tensors[0].tensor
    np.testing.assert_array_equal(tensor_codec.decode(sent, "x").array, array[:, ::2])
