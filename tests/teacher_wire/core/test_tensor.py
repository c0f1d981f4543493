"""Three bytes an id: the bytes are those of the definition, and come back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from teacher_wire.core.tensor import pack_uint24, unpack_uint24

ARRAYS = hnp.arrays(
    np.uint32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9), elements=st.integers(0, (1 << 24) - 1)
)


@given(ARRAYS)
def test_the_bytes_are_each_ids_lowest_three_in_rising_order(ids):
    packed = pack_uint24(ids)
    assert packed.shape == (*ids.shape, 3) and packed.dtype == np.uint8
    assert packed.tobytes() == b"".join(int(number).to_bytes(3, "little") for number in ids.reshape(-1))


@given(ARRAYS, st.booleans())
def test_what_is_packed_comes_back(ids, as_bytes):
    packed = pack_uint24(ids)
    back = np.full(ids.shape, 0xFFFFFFFF, np.uint32)
    unpack_uint24(packed.tobytes() if as_bytes else packed.reshape(-1), back)
    np.testing.assert_array_equal(back, ids)


def test_nothing_is_written_beside_the_rows_that_are_unpacked():
    whole = np.full((4, 5), 7, np.uint32)
    unpack_uint24(b"\xff" * 30, whole[1:3])
    np.testing.assert_array_equal(whole[[0, 3]], 7)
    np.testing.assert_array_equal(whole[1:3], (1 << 24) - 1)


def test_strided_ids_are_packed_in_c_order():
    ids = np.arange(24, dtype=np.uint32).reshape(4, 6).T[::2]
    assert pack_uint24(ids).tobytes() == pack_uint24(ids.copy()).tobytes()


@pytest.mark.parametrize("wrong", [b"\0" * 5, b"\0" * 7])
def test_a_length_that_does_not_fit_is_a_fault_of_ours(wrong):
    with pytest.raises(AssertionError):
        unpack_uint24(wrong, np.zeros(2, np.uint32))
