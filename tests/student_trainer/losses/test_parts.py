"""Arrays that go to a GPU in one transfer."""

from __future__ import annotations

import numpy as np
import torch

from student_trainer.losses.output.parts import on_device_together, pack, packed_bytes, unpacked


def test_they_come_out_as_they_went_in() -> None:
    """Of every width, in any order, empty ones and steps among them; each begins where its numbers may."""
    arrays = [
        np.array([True, False, True]),
        np.arange(5),
        np.array([], np.int64),
        np.array([1.5, -2.0], np.float32),
        np.arange(10)[::3],
        np.array([np.pi]),
        np.array([], np.float32),
        np.array([7], np.int32),
    ]
    there = torch.empty(packed_bytes(arrays), dtype=torch.uint8)
    pack(arrays, there.numpy())
    found = unpacked(arrays, there)
    assert [tensor.dtype for tensor in found] == [torch.from_numpy(array).dtype for array in arrays]
    for tensor, array in zip(found, arrays, strict=True):
        assert tensor.numpy().tolist() == array.tolist()
        assert (tensor.data_ptr() - there.data_ptr()) % 16 == 0
    nothing = torch.empty(0, dtype=torch.uint8)
    pack([], nothing.numpy())
    assert unpacked([], nothing) == []


def test_on_a_cpu_they_stay_where_they_are() -> None:
    array = np.arange(3)
    (tensor,) = on_device_together([array], torch.device("cpu"))
    array[0] = 9
    assert tensor.tolist() == [9, 1, 2]
