"""What joins the parts of several teachers, by Triton kernels: the gradient on the logits in one pass, and groups of tokens in one launch.

In: float32 logits of a chunk on a CUDA device, and what was found of them. Out: as the plain paths of `chunk.py` and `adding.py`, which are the
oracle, and what runs wherever `fused.usable` says no.

Axes: C rows of a chunk, P of them that a teacher has a distribution of, V ids, K classes, G groups of tokens, F their rows.
"""

# mypy: disable-error-code="no-untyped-def"
# The kernels below are Triton's language, which has no types.
from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.losses.cross_tokenizer.fused_projected import ClassGradient
from student_trainer.losses.matmul import empty_rows
from student_trainer.losses.output.parts import LongGroups

try:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # a build of torch without CUDA
    triton = None

BLOCK = 2048  # ids of a row at a time


def gradient(
    z_CV: Tensor,
    lse_C: Tensor,
    scale_C: Tensor | None,
    label_ids_C: Tensor,
    prior_CV: Tensor | None,
    spread: ClassGradient | None,
    place_C: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """prior + scale * (exp(z - lse) - onehot(label)) + each id's share of the gradient on its class: [C, V] in `dtype`.

    Args:
        scale_C: slope in -log q(label); None for 0.
        prior_CV: float32; None for 0.
        spread: None for none.
        place_C: int64, the row of `spread` that belongs to each row, -1 for none; None: they are the same rows.
    """
    grad_CV = empty_rows(z_CV.shape, dtype, z_CV.device)
    rows, vocab = z_CV.shape
    grad_PK, class_PK, coded_V, scale = (z_CV, z_CV, z_CV, 1.0) if spread is None else spread
    prior = z_CV if prior_CV is None else prior_CV
    matrices = z_CV, prior, grad_PK, class_PK, grad_CV
    assert all(there.stride(-1) == 1 for there in matrices), "kernels go along rows"
    with torch.cuda.device_of(z_CV):
        _gradient[((vocab + BLOCK - 1) // BLOCK, rows)](
            *(z_CV, lse_C, lse_C if scale_C is None else scale_C, label_ids_C, prior),
            *(grad_PK, class_PK, coded_V, label_ids_C if place_C is None else place_C, grad_CV, scale),
            *(there.stride(0) for there in matrices),
            VOCAB=vocab, HARD=scale_C is not None, PRIOR=prior_CV is not None,
            SPREAD=spread is not None, PLACED=place_C is not None, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return grad_CV


def add_group_slopes(
    slope_C: Tensor,
    loss_G: Tensor,
    label_logp_C: Tensor,
    teacher_logp_F: Tensor,
    groups: LongGroups,
    first: int,
    last: int,
    origin: int,
    factor_G: Tensor,
    temperature: float,
    smallest: float,
) -> None:
    """`likelihood.binarised` of some groups, from sums of their rows.

    Args:
        slope_C: of the loss in -log q(label) of each row; theirs is added.
        loss_G: float64, of all groups; theirs is written, without a factor.
        label_logp_C: log-probabilities of the labels under the student.
        teacher_logp_F: of the rows of these groups under the teacher, group by group.
        first, last: which groups.
        origin: number of the chunk's first row among the kept ones.
        factor_G: what the slope of each is multiplied by, of all groups.
        temperature, smallest: as in `binarised`.
    """
    with torch.cuda.device_of(slope_C):
        _group_slopes[(last - first,)](
            *(label_logp_C, teacher_logp_F, groups.student_row_F, groups.student_begin_G1, groups.teacher_begin_G1),
            *(factor_G, loss_G, slope_C, first, origin, temperature, smallest),
            num_warps=1,
        )  # fmt: skip


if triton is not None:

    @triton.jit
    def _gradient(
        z_ptr, lse_ptr, scale_ptr, label_ptr, prior_ptr, class_grad_ptr, whole_ptr, class_ptr, place_ptr, out_ptr, tempered,
        z_step, prior_step, grad_step, whole_step, out_step,
        VOCAB: tl.constexpr, HARD: tl.constexpr, PRIOR: tl.constexpr, SPREAD: tl.constexpr,
        PLACED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(1).to(tl.int64)
        ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = ids < VOCAB
        z = tl.load(z_ptr + row * z_step + ids, mask=inside, other=-float("inf"))
        grad = tl.zeros((BLOCK,), tl.float32)
        if PRIOR:
            grad += tl.load(prior_ptr + row * prior_step + ids, mask=inside, other=0.0)
        if HARD:
            scale = tl.load(scale_ptr + row)
            onehot = (ids == tl.load(label_ptr + row)).to(tl.float32)
            grad += scale * (tl.exp(z - tl.load(lse_ptr + row)) - onehot)
        if SPREAD:
            place = tl.load(place_ptr + row) if PLACED else row
            there = inside & (place + tl.zeros((BLOCK,), tl.int64) >= 0)
            coded = tl.load(class_ptr + ids, mask=there, other=0)
            column, has_others = coded >> 1, there & ((coded & 1) == 1)
            of_class = tl.load(class_grad_ptr + place * grad_step + column, mask=there, other=0.0)
            whole = tl.load(whole_ptr + place * whole_step + column, mask=has_others, other=-float("inf"))
            whole = tl.where(has_others, whole, z * tempered)  # its share is 1
            empty = whole == -float("inf")  # a class without mass has no gradient either
            grad += of_class * tl.where(empty, 0.0, tl.exp(z * tempered - tl.where(empty, 0.0, whole)))
        tl.store(out_ptr + row * out_step + ids, grad.to(out_ptr.dtype.element_ty), mask=inside)

    @triton.jit(
        do_not_specialize=["first", "origin"], do_not_specialize_on_alignment=["logp_ptr", "teacher_ptr", "slope_ptr"]
    )
    def _group_slopes(
        logp_ptr, teacher_ptr, row_ptr, begin_ptr, teacher_begin_ptr, factor_ptr, loss_ptr, slope_ptr,
        first, origin, temperature, smallest,
    ):  # fmt: skip
        group = first + tl.program_id(0)
        begin, end = tl.load(begin_ptr + group), tl.load(begin_ptr + group + 1)
        logp = tl.zeros((), tl.float64)
        for f in range(begin, end):
            logp += tl.load(logp_ptr + tl.load(row_ptr + f) - origin).to(tl.float64)
        offset = tl.load(teacher_begin_ptr + first)
        teacher = tl.zeros((), tl.float64)
        for f in range(tl.load(teacher_begin_ptr + group) - offset, tl.load(teacher_begin_ptr + group + 1) - offset):
            teacher += tl.load(teacher_ptr + f).to(tl.float64)
        logp = tl.minimum(logp, -(end - begin).to(tl.float64) * smallest) / temperature
        teacher = teacher / temperature
        a = tl.exp(teacher)
        rest = 1.0 - tl.exp(logp)
        tl.store(loss_ptr + group, -(a * logp + (1.0 - a) * tl.log(rest)))
        slope = ((1.0 - a) - rest) / rest / temperature
        factor = tl.load(factor_ptr + group)
        for f in range(begin, end):
            there = slope_ptr + tl.load(row_ptr + f) - origin  # no row is in two groups
            tl.store(there, tl.load(there) - slope.to(tl.float32) * factor)
