"""Logits over ids as logits over their classes, by Triton kernels: a launch for the classes of one id of a side, one for small ones, one for larger ones,
one for the largest.

In: float32 logits on a CUDA device. Out: as `SideOfClasses.project`, which is the oracle, and what runs wherever `fused.usable` says no.
Classes of one id, nearly all of real pairs, are copied in the order of their numbers, which is that of the student's ids: what lies side by side is read
side by side. Small ones are gone through in the order of their sizes, so that no lane waits for one with a larger class. A program serves several rows, for
which it reads the ids of its classes once; programs of the same rows run side by side, so that what they gather from stays in the device's cache.

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
from student_trainer.losses.matmul import empty_rows

try:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # a build of torch without CUDA
    triton = None

BLOCK = 1024  # small classes, or ids of a large class, at a time
FEW = 8  # ids of a class that a lane goes through one by one
SEVERAL = 64  # ids of a class that is a line of a tile; a larger one has programs of its own
TILE = 16  # classes in a tile
ROWS = 4  # that a program serves


@dataclass(frozen=True, eq=False)
class SortedIds:
    """One side's ids in the order of their classes, int32 on the device.

    Attributes:
        ids_V: class by class, rising within each.
        start_K1: where each class begins among them, and V at the end.
        class_V: of each id.
        alone_S: classes of one id, rising.
        alone_id_S: their ids.
        few_A: classes of more, up to `FEW` ids, smaller ones first.
        several_B: classes of more, up to `SEVERAL`.
        large_G: still larger ones.
    """

    ids_V: Tensor
    start_K1: Tensor
    class_V: Tensor
    alone_S: Tensor
    alone_id_S: Tensor
    few_A: Tensor
    several_B: Tensor
    large_G: Tensor

    @classmethod
    def of(cls, class_V: Tensor, size_K: np.ndarray) -> SortedIds:
        """From the class of each id and the sizes of the classes; waits for the device, so once a run."""
        host_V, device = class_V.cpu().numpy(), class_V.device
        there = lambda array: torch.from_numpy(array.astype(np.int32)).to(device)  # noqa: E731
        start_K1 = np.concatenate([[0], np.cumsum(size_K)])
        order_V, by_size_K = np.argsort(host_V, kind="stable"), np.argsort(size_K, kind="stable")
        alone_S, *larger = np.split(by_size_K, np.searchsorted(size_K[by_size_K], [1, FEW, SEVERAL], side="right"))
        return cls(
            *(there(order_V), there(start_K1), there(host_V), there(alone_S), there(order_V[start_K1[alone_S]])),
            *(there(some) for some in larger),
        )

    @property
    def classes(self) -> int:
        return self.start_K1.numel() - 1


def sum_classes(z_RV: Tensor, row_P: Tensor | None, side: SortedIds, scale: float) -> Tensor:
    """[P, K], log of the sum of exp(scale * z) over the ids of each class; of a class of one id exactly scale * z.

    Args:
        row_P: int64, which rows; None for all.
        scale: 1 / temperature.
    """
    assert z_RV.stride(-1) == 1, "kernels go along rows"
    rows = len(z_RV) if row_P is None else len(row_P)
    class_PK = empty_rows((rows, side.classes), z_RV.dtype, z_RV.device)
    steps = z_RV.stride(0), class_PK.stride(0)
    read = (z_RV, z_RV if row_P is None else row_P, side.ids_V, side.start_K1)
    constants = {"CHOSEN": row_P is not None}
    alone, few, several, large = side.alone_S.numel(), side.few_A.numel(), side.several_B.numel(), side.large_G.numel()
    several_rows = (rows + ROWS - 1) // ROWS
    with torch.cuda.device_of(z_RV):
        if alone:
            _copy_alone[((alone + BLOCK - 1) // BLOCK, several_rows)](
                *(*read[:2], side.alone_id_S, side.alone_S, class_PK, *steps, scale, rows, alone),
                **constants, ROWS=ROWS, BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip
        if few:
            _sum_few[((few + BLOCK - 1) // BLOCK, several_rows)](
                *(*read, side.few_A, class_PK, *steps, scale, rows, few),
                **constants, ROWS=ROWS, BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip
        if several:
            _sum_several[((several + TILE - 1) // TILE, several_rows)](
                *(*read, side.several_B, class_PK, *steps, scale, rows, several),
                **constants, ROWS=ROWS, TILE=TILE, SEVERAL=SEVERAL, num_warps=4,
            )  # fmt: skip
        if large:
            _sum_large[(large, rows)](
                *(*read, side.large_G, class_PK, *steps, scale), **constants, BLOCK=BLOCK, num_warps=8
            )
    return class_PK


if triton is not None:

    @triton.jit
    def _copy_alone(
        z_ptr, row_ptr, ids_ptr, alone_ptr, out_ptr, z_step, out_step, scale, rows, count,
        CHOSEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        column = tl.load(alone_ptr + at, mask=inside, other=0)
        ids = tl.load(ids_ptr + at, mask=inside, other=0)
        place = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        row = tl.load(row_ptr + tl.minimum(place, rows - 1)) if CHOSEN else place
        wanted = (place < rows)[:, None] & inside[None, :]
        z = tl.load(z_ptr + row[:, None] * z_step + ids[None, :], mask=wanted, other=0.0)  # all under way at once
        tl.store(out_ptr + place[:, None] * out_step + column[None, :], z * scale, mask=wanted)

    @triton.jit
    def _sum_few(
        z_ptr, row_ptr, ids_ptr, start_ptr, few_ptr, out_ptr, z_step, out_step, scale, rows, count,
        CHOSEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        column = tl.load(few_ptr + at, mask=inside, other=0)
        start = tl.load(start_ptr + column, mask=inside, other=0)
        size = tl.load(start_ptr + column + 1, mask=inside, other=0) - start
        first = tl.load(ids_ptr + start, mask=inside, other=0)
        most = tl.max(size, 0)
        for r in tl.static_range(ROWS):
            place = tl.program_id(1).to(tl.int64) * ROWS + r
            row = tl.load(row_ptr + tl.minimum(place, rows - 1)) if CHOSEN else place
            wanted = inside & (place + tl.zeros((BLOCK,), tl.int64) < rows)
            top = tl.load(z_ptr + row * z_step + first, mask=wanted, other=-float("inf")) * scale
            total = tl.full((BLOCK,), 1.0, tl.float32)
            for j in range(1, most):
                own = wanted & (j < size)
                ids = tl.load(ids_ptr + start + j, mask=own, other=0)
                z = tl.load(z_ptr + row * z_step + ids, mask=own, other=-float("inf")) * scale
                new_top = tl.maximum(top, z)
                base = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing but -inf so far
                total = total * tl.exp(top - base) + tl.exp(z - base)
                top = new_top
            tl.store(out_ptr + place * out_step + column, tl.log(total) + top, mask=wanted)

    @triton.jit
    def _sum_several(
        z_ptr, row_ptr, ids_ptr, start_ptr, several_ptr, out_ptr, z_step, out_step, scale, rows, count,
        CHOSEN: tl.constexpr, ROWS: tl.constexpr,
        TILE: tl.constexpr, SEVERAL: tl.constexpr,
    ):  # fmt: skip
        which = tl.program_id(0) * TILE + tl.arange(0, TILE)
        inside = which < count
        column = tl.load(several_ptr + which, mask=inside, other=0)
        start = tl.load(start_ptr + column, mask=inside, other=0)
        size = tl.load(start_ptr + column + 1, mask=inside, other=0) - start
        j = tl.arange(0, SEVERAL)
        own = j[None, :] < size[:, None]
        ids = tl.load(ids_ptr + start[:, None] + j[None, :], mask=own, other=0)
        for r in tl.static_range(ROWS):
            place = tl.program_id(1).to(tl.int64) * ROWS + r
            row = tl.load(row_ptr + tl.minimum(place, rows - 1)) if CHOSEN else place
            z = (
                tl.load(
                    z_ptr + row * z_step + ids,
                    mask=own & (place + tl.zeros((TILE, SEVERAL), tl.int64) < rows),
                    other=-float("inf"),
                )
                * scale
            )
            top = tl.max(z, 1)
            base = tl.where(top == -float("inf"), 0.0, top)
            total = tl.sum(tl.exp(z - base[:, None]), 1)
            tl.store(
                out_ptr + place * out_step + column,
                tl.log(total) + top,
                mask=inside & (place + tl.zeros((TILE,), tl.int64) < rows),
            )

    @triton.jit
    def _sum_large(
        z_ptr, row_ptr, ids_ptr, start_ptr, large_ptr, out_ptr, z_step, out_step, scale,
        CHOSEN: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(1).to(tl.int64)
        row = tl.load(row_ptr + place) if CHOSEN else place
        z_ptr += row * z_step
        column = tl.load(large_ptr + tl.program_id(0))
        start, stop = tl.load(start_ptr + column), tl.load(start_ptr + column + 1)
        top = -float("inf")
        total = 0.0
        for first in range(start, stop, BLOCK):
            at = first + tl.arange(0, BLOCK)
            ids = tl.load(ids_ptr + at, mask=at < stop, other=0)
            z = tl.load(z_ptr + ids, mask=at < stop, other=-float("inf")) * scale
            top, total = fused.add_block(top, total, z)
        tl.store(out_ptr + place * out_step + column, tl.log(total) + top)
