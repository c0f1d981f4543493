"""Means of the sorted parts of |u| without a sort, as a Triton kernel: a histogram of the 32,768 magnitudes that 16 bits can have.

In: u [R, F] of 16-bit floats on a CUDA device; out: what `activation.sorted_means` gives. Exact: values that share a magnitude are equal, so
that counts by magnitude are the sorted row. A program adds the channels of a row into counts of its own, which stay in the L2 cache, then
walks from the row's largest magnitude down to its smallest and gives each part its share of every count. Per channel one atomic addition and
about twenty operations, where a bitwise selection of fifteen ranks takes 15 x 15 comparisons and a segmented sort moves its indices too.
Must never be the only way: `activation.sorted_means` is the oracle, and what runs wherever `usable` says no.

Axes: R rows, F ffn width, Q parts.
"""

# mypy: disable-error-code="no-untyped-def"
# The kernel below is Triton's language, which has no types.
from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # a build of torch without CUDA
    triton = None

MAGNITUDES = 1 << 15
_PROGRAMS = 528  # four per multiprocessor of a Hopper card; their counts are 69 MB, of which rows touch about a tenth
_CHANNELS = 2048  # of a row at a time
_BINS = 256  # of the counts at a time


def usable(u_RF: Tensor) -> bool:
    """Whether the kernel runs on these rows."""
    return triton is not None and u_RF.is_cuda and u_RF.dtype in (torch.bfloat16, torch.float16)


def sorted_means(u_RF: Tensor, parts: int) -> Tensor:
    """See `activation.sorted_means`; `parts` is a power of two."""
    rows, width = u_RF.shape
    assert u_RF.is_contiguous(), "the kernel indexes rows by F"
    made_RQ = torch.empty(rows, parts, dtype=torch.float32, device=u_RF.device)
    if not rows:
        return made_RQ
    programs = min(rows, _PROGRAMS)
    counts = torch.zeros(programs, MAGNITUDES, dtype=torch.int32, device=u_RF.device)
    with torch.cuda.device_of(u_RF):
        _means[(programs,)](
            u_RF.view(torch.int16), u_RF, counts, made_RQ, rows, width,
            PARTS=parts, CHANNELS=_CHANNELS, BINS=_BINS, PROGRAMS=programs, MAGNITUDES=MAGNITUDES, num_warps=8,
        )  # fmt: skip
    return made_RQ


if triton is not None:

    @triton.jit
    def _means(
        bits_ptr, u_ptr, counts_ptr, made_ptr, rows, width,
        PARTS: tl.constexpr, CHANNELS: tl.constexpr, BINS: tl.constexpr, PROGRAMS: tl.constexpr, MAGNITUDES: tl.constexpr,
    ):  # fmt: skip
        kept = u_ptr.dtype.element_ty
        counts_ptr += tl.program_id(0) * MAGNITUDES
        part = tl.arange(0, PARTS)
        begin = (part * width) // PARTS
        end = tl.maximum(((part + 1) * width) // PARTS, begin + 1)
        for row in range(tl.program_id(0), rows, PROGRAMS):
            row_ptr = bits_ptr + tl.cast(row, tl.int64) * width
            high = tl.full([CHANNELS], 0, tl.int32)
            low = tl.full([CHANNELS], MAGNITUDES, tl.int32)
            for at in range(0, width, CHANNELS):
                channel = at + tl.arange(0, CHANNELS)
                magnitude = tl.load(row_ptr + channel, mask=channel < width, other=0).to(tl.int32) & 0x7FFF
                there = magnitude > 0  # a zero adds nothing to any part, and has its place behind all others
                tl.atomic_add(counts_ptr + magnitude, 1, mask=there, sem="relaxed")
                high = tl.maximum(high, magnitude)
                low = tl.minimum(low, tl.where(there, magnitude, MAGNITUDES))
            top, bottom = tl.max(high), tl.min(low)
            tl.debug_barrier()  # all counts of the row are there
            mass = tl.zeros([PARTS], tl.float32)
            total = 0.0
            before = 0
            for below in range(0, top - bottom + 1, BINS):
                magnitude = top - below - tl.arange(0, BINS)
                count = tl.load(counts_ptr + magnitude, mask=magnitude >= 0, other=0, cache_modifier=".cg")
                tl.store(counts_ptr + magnitude, tl.zeros([BINS], tl.int32), mask=magnitude >= 0)
                value = magnitude.to(tl.int16).to(kept, bitcast=True).to(tl.float32)
                last = before + tl.cumsum(count)
                first = last - count
                within = tl.minimum(last[:, None], end[None, :]) - tl.maximum(first[:, None], begin[None, :])
                # Of an empty part nothing is added: magnitudes above infinity's are no numbers.
                mass += tl.sum(tl.where(within > 0, within.to(tl.float32) * value[:, None], 0.0), 0)
                total += tl.sum(tl.where(count > 0, count.to(tl.float32) * value, 0.0))
                before += tl.sum(count)
            mean = mass / (end - begin).to(tl.float32)
            tl.store(made_ptr + tl.cast(row, tl.int64) * PARTS + part, mean / tl.where(total < 1e-30, 1e-30, total))
            tl.debug_barrier()  # the counts are 0 again before the next row
