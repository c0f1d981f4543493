"""The passes between ids and their classes as Triton kernels: nothing of [C, V] but what goes in and out.

In: float32 logits on a CUDA device. Out: as `projection.py`, which is the oracle, and what runs wherever `fused.usable` says no.

Axes: C rows of a chunk, V ids of one side, K classes, n classes of a bucket, s ids of each.
"""

# mypy: disable-error-code="no-untyped-def"
# The kernels below are Triton's language, which has no types.
from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # a build of torch without CUDA
    triton = None

BLOCK = 1024  # ids of a row, or classes, at a time
LARGEST = 64  # ids of a class: a lane goes through them one by one


def sum_bucket(z_CV: Tensor, ids_ns: Tensor, size_n: Tensor, class_n: Tensor, class_CK: Tensor) -> None:
    """Writes the log-sum-exp of each class of a bucket to its column of `class_CK`.

    Args:
        ids_ns: int64, [n * s].
        size_n: int64, how many of the s are its own.
        class_n: int64.
    """
    rows, vocab = z_CV.shape
    count = class_n.numel()
    grid = (rows, (count + BLOCK - 1) // BLOCK)
    with torch.cuda.device_of(z_CV):
        _sum_bucket[grid](
            *(z_CV, ids_ns, size_n, class_n, class_CK, count, ids_ns.numel() // count),
            VOCAB=vocab, CLASSES=class_CK.shape[1], BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


def spread(grad_CK: Tensor, z_CV: Tensor, class_V: Tensor, class_CK: Tensor) -> Tensor:
    """[C, V], `grad_CK` of each id's class times its share of the class."""
    assert grad_CK.is_contiguous() and z_CV.is_contiguous() and class_CK.is_contiguous(), (
        "kernels index rows by V and K"
    )
    grad_CV = torch.empty_like(z_CV)
    rows, vocab = z_CV.shape
    grid = (rows, (vocab + BLOCK - 1) // BLOCK)
    with torch.cuda.device_of(z_CV):
        _spread[grid](
            *(grad_CK, z_CV, class_V, class_CK, grad_CV),
            VOCAB=vocab, CLASSES=class_CK.shape[1], BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return grad_CV


if triton is not None:

    @triton.jit
    def _sum_bucket(
        z_ptr, ids_ptr, size_ptr, class_ptr, out_ptr, count, most,
        VOCAB: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        size = tl.load(size_ptr + at, mask=inside, other=0)
        top = tl.full((BLOCK,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for j in range(most):
            own = j < size
            ids = tl.load(ids_ptr + at.to(tl.int64) * most + j, mask=own, other=0)
            z = tl.load(z_ptr + row * VOCAB + ids, mask=own, other=-float("inf"))
            new_top = tl.maximum(top, z)
            base = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing but -inf so far
            total = total * tl.exp(top - base) + tl.exp(z - base)
            top = new_top
        found = tl.where(top == -float("inf"), -float("inf"), tl.log(total) + top)
        column = tl.load(class_ptr + at, mask=inside, other=0)
        tl.store(out_ptr + row * CLASSES + column, found, mask=inside)

    @triton.jit
    def _spread(
        grad_ptr, z_ptr, class_ptr, whole_ptr, out_ptr,
        VOCAB: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = ids < VOCAB
        column = tl.load(class_ptr + ids, mask=inside, other=0)
        z = tl.load(z_ptr + row * VOCAB + ids, mask=inside, other=-float("inf"))
        whole = tl.load(whole_ptr + row * CLASSES + column, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + row * CLASSES + column, mask=inside, other=0.0)
        share = tl.where(whole == -float("inf"), 0.0, tl.exp(z - whole))
        tl.store(out_ptr + row * VOCAB + ids, grad * share, mask=inside)
