"""Logits over ids as logits over their classes, by one Triton kernel.

In: float32 logits on a CUDA device. Out: as `SideOfClasses.project`, which is the oracle, and what runs wherever `fused.usable` says no.
One launch has programs for classes of four sizes: those that need the longest come first. All programs of the same few rows run side by side, so that
what they read, and the lines that several of them write parts of, stay in the device's cache until they are whole.
Classes of one id, nearly all of real pairs, are copied in the order of their numbers, which is that of the student's ids: what lies side by side is read
side by side. Small ones are gone through in the order of their sizes, so that no lane waits for one with a larger class. A program serves several rows, for
which it reads the ids of its classes once, and whose logits are under way at the same time.

Axes: R rows of logits, P of them that are wanted, V ids of one side, K classes, S of them of one id.
"""

# mypy: disable-error-code="no-untyped-def"
# The kernels below are Triton's language, which has no types.
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.matmul import empty_rows

try:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # a build of torch without CUDA
    triton = None

BLOCK = 512  # small classes, or ids of a large class, at a time
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
        coded_V: of each id twice its class, and 1 more if the class has another id.
        by_size_K: the classes: those of one id, rising; then of more, up to `FEW` ids, smaller ones first; up to `SEVERAL`; still larger ones.
        alone_id_S: the ids of the first of these.
        counts: how many there are of each of these four.
    """

    ids_V: Tensor
    start_K1: Tensor
    coded_V: Tensor
    by_size_K: Tensor
    alone_id_S: Tensor
    counts: tuple[int, int, int, int]

    @classmethod
    def of(cls, class_V: Tensor, size_K: np.ndarray) -> SortedIds:
        """From the class of each id and the sizes of the classes; waits for the device, so once a run."""
        host_V, device = class_V.cpu().numpy(), class_V.device
        there = lambda array: torch.from_numpy(array.astype(np.int32)).to(device)  # noqa: E731
        start_K1 = np.concatenate([[0], np.cumsum(size_K)])
        order_V, by_size_K = np.argsort(host_V, kind="stable"), np.argsort(size_K, kind="stable")
        ends = np.searchsorted(size_K[by_size_K], [1, FEW, SEVERAL], side="right")
        alone, few, several, large = (int(n) for n in np.diff([0, *ends, len(size_K)]))
        return cls(
            ids_V=there(order_V),
            start_K1=there(start_K1),
            coded_V=there(2 * host_V + (size_K[host_V] > 1)),
            by_size_K=there(by_size_K),
            alone_id_S=there(order_V[start_K1[by_size_K[:alone]]]),
            counts=(alone, few, several, large),
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
    alone, few, several, large = side.counts
    programs = large + -(-several // TILE) + -(-few // BLOCK) + -(-alone // BLOCK)
    with torch.cuda.device_of(z_RV):
        _sum[(programs, -(-rows // ROWS))](
            *(z_RV, z_RV if row_P is None else row_P, side.ids_V, side.start_K1, side.by_size_K, side.alone_id_S, class_PK),
            *(z_RV.stride(0), class_PK.stride(0), scale, rows, alone, few, several, large),
            CHOSEN=row_P is not None, ROWS=ROWS, BLOCK=BLOCK, TILE=TILE, SEVERAL=SEVERAL, num_warps=4,
        )  # fmt: skip
    return class_PK


def safe_factor(class_PK: Tensor, lse_P: Tensor, giants: Tensor, factor_P: Tensor) -> tuple[Tensor, Tensor]:
    """`projected.safe_among_all`, bool [P]; and the factor, 0 in rows that are not safe."""
    safe_P, safe_factor_P = torch.empty_like(factor_P, dtype=torch.bool), torch.empty_like(factor_P)
    with torch.cuda.device_of(class_PK):
        _safe[(len(class_PK),)](
            *(class_PK, lse_P, giants, factor_P, safe_P, safe_factor_P, *class_PK.stride(), giants.numel()),
            BLOCK=SEVERAL, num_warps=1,
        )  # fmt: skip
    return safe_P, safe_factor_P


if triton is not None:

    @triton.jit
    def _safe(
        class_ptr, lse_ptr, giant_ptr, factor_ptr, safe_ptr, safe_factor_ptr, row_step, class_step, count,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        limit = tl.load(lse_ptr + row) + tl.log(0.5)
        unsafe = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, count, BLOCK):
            at = first + tl.arange(0, BLOCK)
            column = tl.load(giant_ptr + at, mask=at < count, other=0)
            z = tl.load(class_ptr + row * row_step + column * class_step, mask=at < count, other=-float("inf"))
            unsafe |= (~(z <= limit)).to(tl.int32)  # NaN is not safe either
        is_safe = tl.max(unsafe, 0) == 0
        tl.store(safe_ptr + row, is_safe)
        tl.store(safe_factor_ptr + row, tl.where(is_safe, tl.load(factor_ptr + row), 0.0))

    @triton.jit
    def add_lanes(top, total, z):
        """The largest logit of each lane so far, and the sum of exp(logit - largest), with one more logit each."""
        new_top = tl.maximum(top, z)
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing but -inf so far
        return new_top, total * tl.exp(top - base) + tl.exp(z - base)

    @triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["row_ptr"])
    def _sum(
        z_ptr, row_ptr, ids_ptr, start_ptr, class_ptr, alone_ptr, out_ptr, z_step, out_step, scale,
        rows, alone, few, several, large,
        CHOSEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SEVERAL: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        row = tl.load(row_ptr + tl.minimum(place, rows - 1)) if CHOSEN else place
        there = (place < rows)[:, None]
        z_row_ptr, out_row_ptr = z_ptr + row[:, None] * z_step, out_ptr + place[:, None] * out_step
        part = tl.program_id(0)
        tiles, blocks = (several + TILE - 1) // TILE, (few + BLOCK - 1) // BLOCK
        if part < large:
            _large(
                z_row_ptr,
                ids_ptr,
                start_ptr,
                class_ptr + alone + few + several + part,
                out_row_ptr,
                scale,
                there,
                ROWS,
                BLOCK,
            )
        elif part < large + tiles:
            class_ptr += alone + few
            for r in tl.static_range(ROWS):
                one = tl.program_id(1).to(tl.int64) * ROWS + r
                its = tl.load(row_ptr + tl.minimum(one, rows - 1)) if CHOSEN else one
                _several(
                    z_ptr + its * z_step, ids_ptr, start_ptr, class_ptr, out_ptr + one * out_step, scale,
                    part - large, several, one, rows, TILE, SEVERAL,
                )  # fmt: skip
        elif part < large + tiles + blocks:
            at = (part - large - tiles) * BLOCK + tl.arange(0, BLOCK)
            _few(
                z_row_ptr, ids_ptr, start_ptr, class_ptr + alone + at, out_row_ptr, scale, there, at < few, ROWS, BLOCK
            )
        else:
            at = (part - large - tiles - blocks) * BLOCK + tl.arange(0, BLOCK)
            column = tl.load(class_ptr + at, mask=at < alone, other=0)
            ids = tl.load(alone_ptr + at, mask=at < alone, other=0)
            wanted = there & (at < alone)[None, :]
            z = tl.load(z_row_ptr + ids[None, :], mask=wanted, other=0.0)
            tl.store(out_row_ptr + column[None, :], z * scale, mask=wanted)

    @triton.jit
    def _large(
        z_row_ptr, ids_ptr, start_ptr, class_ptr, out_row_ptr, scale, there, ROWS: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One class; its ids in lanes."""
        column = tl.load(class_ptr)
        start, stop = tl.load(start_ptr + column), tl.load(start_ptr + column + 1)
        top = tl.full((ROWS, BLOCK), -float("inf"), tl.float32)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(start, stop, BLOCK):
            at = first + tl.arange(0, BLOCK)
            ids = tl.load(ids_ptr + at, mask=at < stop, other=0)
            z = tl.load(z_row_ptr + ids[None, :], mask=there & (at < stop)[None, :], other=-float("inf"))
            top, total = add_lanes(top, total, z * scale)
        highest = tl.max(top, 1)
        base = tl.where(highest == -float("inf"), 0.0, highest)
        whole = tl.log(tl.sum(total * tl.exp(top - base[:, None]), 1)) + highest
        tl.store(out_row_ptr + column, whole[:, None], mask=there)

    @triton.jit
    def _several(
        z_ptr, ids_ptr, start_ptr, class_ptr, out_ptr, scale, tile, count, place, rows, TILE: tl.constexpr, SEVERAL: tl.constexpr
    ):  # fmt: skip
        """A tile of classes of one row, a line each."""
        at = tile * TILE + tl.arange(0, TILE)
        inside = (at < count) & (place + tl.zeros((TILE,), tl.int64) < rows)
        column = tl.load(class_ptr + at, mask=inside, other=0)
        start = tl.load(start_ptr + column, mask=inside, other=0)
        size = tl.load(start_ptr + column + 1, mask=inside, other=0) - start
        j = tl.arange(0, SEVERAL)
        own = inside[:, None] & (j[None, :] < size[:, None])
        ids = tl.load(ids_ptr + start[:, None] + j[None, :], mask=own, other=0)
        z = tl.load(z_ptr + ids, mask=own, other=-float("inf")) * scale
        top = tl.max(z, 1)
        base = tl.where(top == -float("inf"), 0.0, top)
        total = tl.sum(tl.exp(z - base[:, None]), 1)
        tl.store(out_ptr + column, tl.log(total) + top, mask=inside)

    @triton.jit
    def _few(
        z_row_ptr, ids_ptr, start_ptr, class_ptr, out_row_ptr, scale, there, inside, ROWS: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """A class a lane, which goes through its ids."""
        column = tl.load(class_ptr, mask=inside, other=0)
        start = tl.load(start_ptr + column, mask=inside, other=0)
        size = tl.load(start_ptr + column + 1, mask=inside, other=0) - start
        ids = tl.load(ids_ptr + start, mask=inside, other=0)
        top = tl.load(z_row_ptr + ids[None, :], mask=there & inside[None, :], other=-float("inf")) * scale
        total = tl.full((ROWS, BLOCK), 1.0, tl.float32)
        for j in range(1, tl.max(size, 0)):
            own = inside & (j < size)
            ids = tl.load(ids_ptr + start + j, mask=own, other=0)
            z = tl.load(z_row_ptr + ids[None, :], mask=there & own[None, :], other=-float("inf"))
            top, total = add_lanes(top, total, z * scale)
        tl.store(out_row_ptr + column[None, :], tl.log(total) + top, mask=there & inside[None, :])
