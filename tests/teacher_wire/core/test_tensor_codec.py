"""The tensor format: what goes in comes out, and every broken rule is refused by name."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from teacher_wire.core import tensor_codec
from teacher_wire.core.errors import TensorError
from teacher_wire.core.tensor import DTYPES, Tensor
from teacher_wire.v2 import teacher_pb2 as pb

WIRE_MAX = {"uint24": (1 << 24) - 1}


@given(st.data(), st.sampled_from(sorted(DTYPES)))
def test_round_trip(data, name):
    dtype = np.dtype(DTYPES[name][0])
    elements = {"elements": st.integers(0, WIRE_MAX[name])} if name in WIRE_MAX else {}
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5), **elements))
    message = pb.Tensor.FromString(tensor_codec.encode(Tensor(name, array)).SerializeToString())
    back = tensor_codec.decode(message, "x")
    assert back.dtype == name and back.array.dtype == dtype
    np.testing.assert_array_equal(back.array, array)
    assert len(message.data) == Tensor(name, array).payload_bytes


def test_non_contiguous_arrays_are_encoded_in_c_order():
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    np.testing.assert_array_equal(tensor_codec.decode(tensor_codec.encode(Tensor("float32", array)), "x").array, array)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.Tensor(dtype=pb.FLOAT32, shape=[2], data=b"\0" * 7), "ids.data"),
        (pb.Tensor(dtype=pb.FLOAT32, shape=[2], data=b"\0" * 9), "ids.data"),
        (pb.Tensor(dtype=pb.UINT24, shape=[2], data=b"\0" * 8), "ids.data"),
        (pb.Tensor(dtype=99, shape=[0], data=b""), "ids.dtype"),
        (pb.Tensor(shape=[0], data=b""), "ids.dtype"),
        (pb.Tensor(dtype=pb.INT8, shape=[1] * 5, data=b"\0"), "ids.shape"),
        (pb.Tensor(dtype=pb.INT8, shape=[1 << 63, 1 << 63], data=b""), "ids.shape"),
        (pb.Tensor(dtype=pb.INT8, shape=[0, 1 << 63], data=b""), "ids.shape"),
    ],
)
def test_broken_tensors_are_refused_by_field(message, field):
    with pytest.raises(TensorError) as caught:
        tensor_codec.decode(message, "ids")
    assert caught.value.field == field


@given(
    st.lists(st.sampled_from([1, 3, 2**20, 2**39, 2**40, 2**63, 2**64 - 1]), max_size=4),
    st.sampled_from(sorted(DTYPES)),
)
def test_empty_shapes_of_a_hostile_peer_are_read_or_refused(axes, name):
    """Nothing but a TensorError may come of them; numpy cannot count some shapes that hold nothing."""
    message = pb.Tensor(dtype=tensor_codec.dtype_code(name), shape=[*axes, 0])
    with contextlib.suppress(TensorError):
        assert tensor_codec.decode(message, "x").shape == (*axes, 0)


def test_an_empty_tensor_whose_axes_are_each_short_is_refused():
    """As the fuzz of a vLLM teacher found it."""
    message = pb.Tensor(dtype=tensor_codec.dtype_code("int32"), shape=[41_166_215, 8_512_140, 7_464_889_010, 0])
    with pytest.raises(TensorError, match="axes too long"):
        tensor_codec.decode(message, "x")


def test_bfloat16_reads_as_the_numbers_it_means():
    bits = np.array([0x3F80, 0xC000, 0x0000, 0x7F80], np.uint16)  # 1, -2, 0, inf
    np.testing.assert_array_equal(Tensor("bfloat16", bits).as_float32(), np.float32([1, -2, 0, np.inf]))


def test_a_tensor_says_when_its_array_has_another_type():
    with pytest.raises(TensorError, match="held as uint16"):
        Tensor("bfloat16", np.zeros(1, np.float32))
