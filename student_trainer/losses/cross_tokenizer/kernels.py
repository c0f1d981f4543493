"""Logits over ids as logits over their classes, by Triton kernels: one launch for all classes of a side, and one for its largest.

In: float32 logits on a CUDA device. Out: as `SideOfClasses.project`, which is the oracle, and what runs wherever `fused.usable` says no.
Programs of one row run side by side, so that the row they gather from stays in the device's cache.

Axes: R rows of logits, P of them that are wanted, V ids of one side, K classes, G of them that are large.
"""

# mypy: disable-error-code="no-untyped-def"
# The kernels below are Triton's language, which has no types.
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses import fused

try:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # a build of torch without CUDA
    triton = None

BLOCK = 1024  # classes, or ids of a large class, at a time
LARGEST = 64  # ids of a class that a lane goes through one by one; a larger one has programs of its own


@dataclass(frozen=True, eq=False)
class SortedIds:
    """One side's ids in the order of their classes, int32 on the device.

    Attributes:
        ids_V: class by class, rising within each.
        start_K1: where each class begins among them, and V at the end.
        class_V: of each id.
        large_G: classes of more than `LARGEST` ids.
    """

    ids_V: Tensor
    start_K1: Tensor
    class_V: Tensor
    large_G: Tensor

    @classmethod
    def of(cls, class_V: Tensor, size_K: np.ndarray) -> SortedIds:
        """From the class of each id and the sizes of the classes; waits for the device, so once a run."""
        host_V, device = class_V.cpu().numpy(), class_V.device
        there = lambda array: torch.from_numpy(array.astype(np.int32)).to(device)  # noqa: E731
        start_K1 = np.concatenate([[0], np.cumsum(size_K)])
        large_G = np.flatnonzero(size_K > LARGEST)
        return cls(there(np.argsort(host_V, kind="stable")), there(start_K1), there(host_V), there(large_G))

    @property
    def classes(self) -> int:
        return self.start_K1.numel() - 1


def sum_classes(z_RV: Tensor, row_P: Tensor | None, side: SortedIds, scale: float) -> Tensor:
    """[P, K], log of the sum of exp(scale * z) over the ids of each class; of a class of one id exactly scale * z.

    Args:
        row_P: int64, which rows; None for all.
        scale: 1 / temperature.
    """
    assert z_RV.is_contiguous(), "kernels index rows by V"
    vocab, rows = z_RV.shape[1], len(z_RV) if row_P is None else len(row_P)
    class_PK = z_RV.new_empty(rows, side.classes)
    which = z_RV if row_P is None else row_P
    constants = {"VOCAB": vocab, "CLASSES": side.classes, "CHOSEN": row_P is not None, "BLOCK": BLOCK}
    with torch.cuda.device_of(z_RV):
        _sum_classes[((side.classes + BLOCK - 1) // BLOCK, rows)](
            *(z_RV, which, side.ids_V, side.start_K1, class_PK, scale),
            **constants, LARGEST=LARGEST, num_warps=8,
        )  # fmt: skip
        if side.large_G.numel():
            _sum_large[(side.large_G.numel(), rows)](
                *(z_RV, which, side.ids_V, side.start_K1, side.large_G, class_PK, scale), **constants, num_warps=8
            )
    return class_PK


if triton is not None:

    @triton.jit
    def _sum_classes(
        z_ptr, row_ptr, ids_ptr, start_ptr, out_ptr, scale,
        VOCAB: tl.constexpr, CLASSES: tl.constexpr, CHOSEN: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(1).to(tl.int64)
        row = tl.load(row_ptr + place) if CHOSEN else place
        z_ptr += row * VOCAB
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < CLASSES
        start = tl.load(start_ptr + at, mask=inside, other=0)
        size = tl.load(start_ptr + at + 1, mask=inside, other=0) - start
        size = tl.where(size > LARGEST, 1, size)  # `_sum_large` writes those
        ids = tl.load(ids_ptr + start, mask=inside, other=0)
        top = tl.load(z_ptr + ids, mask=inside, other=-float("inf")) * scale
        total = tl.full((BLOCK,), 1.0, tl.float32)  # of one id: log 1 adds nothing
        for j in range(1, tl.max(size, 0)):
            own = j < size
            ids = tl.load(ids_ptr + start + j, mask=own, other=0)
            z = tl.load(z_ptr + ids, mask=own, other=-float("inf")) * scale
            new_top = tl.maximum(top, z)
            base = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing but -inf so far
            total = total * tl.exp(top - base) + tl.exp(z - base)
            top = new_top
        tl.store(out_ptr + place * CLASSES + at, tl.log(total) + top, mask=inside)

    @triton.jit
    def _sum_large(
        z_ptr, row_ptr, ids_ptr, start_ptr, large_ptr, out_ptr, scale,
        VOCAB: tl.constexpr, CLASSES: tl.constexpr, CHOSEN: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(1).to(tl.int64)
        row = tl.load(row_ptr + place) if CHOSEN else place
        z_ptr += row * VOCAB
        column = tl.load(large_ptr + tl.program_id(0))
        start, stop = tl.load(start_ptr + column), tl.load(start_ptr + column + 1)
        top = -float("inf")
        total = 0.0
        for first in range(start, stop, BLOCK):
            at = first + tl.arange(0, BLOCK)
            ids = tl.load(ids_ptr + at, mask=at < stop, other=0)
            z = tl.load(z_ptr + ids, mask=at < stop, other=-float("inf")) * scale
            top, total = fused.add_block(top, total, z)
        tl.store(out_ptr + place * CLASSES + column, tl.log(total) + top)
