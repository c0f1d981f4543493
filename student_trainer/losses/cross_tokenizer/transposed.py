"""The passes over a chunk of logits whose classes are compared, by Triton kernels, with the logits of an id side by side in memory: [V, C].

In: float32 logits [V, W] on a CUDA device, of W rows, a multiple of `ROWS`, of which those behind the last are made up. Out: figures per row, logits of
classes [K, W], gradients likewise.
Ids of a class lie anywhere among the ids. Read row by row, each costs a whole line of the cache; here it is a line of rows that are all wanted, whatever the
order. Nothing passes from one row to another, so made-up rows need no mask; their coefficients are 0.
`projected.py` is the oracle, and what runs wherever `fused.usable` says no; `kernels.py` is for truncated teachers, whose passes go along rows.

Axes: W rows, V ids of a side, K classes, S spans of ids that different programs go through.
"""

# mypy: disable-error-code="no-untyped-def"
# The kernels below are Triton's language, which has no types.
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses import fused
from student_trainer.losses.cross_tokenizer import kernels
from student_trainer.losses.cross_tokenizer.fused_projected import ClassGradient
from student_trainer.losses.cross_tokenizer.kernels import SortedIds
from student_trainer.losses.divergence import Divergence

try:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # a build of torch without CUDA
    triton = None

ROWS = 64  # that a program serves; widths are multiples of it
IDS = 32  # at a time
SPANS = 64  # programs that share the ids of the same rows
SOME = 16  # classes of more than one id in a tile


def width_of(rows: np.ndarray) -> np.ndarray:
    """W, for so many rows each."""
    return -(-rows // ROWS) * ROWS


def lse(z_VW: Tensor, scale: float = 1.0) -> Tensor:
    """[W], log-sum-exp of scale * z of each row."""
    return _figures(z_VW, None, scale, 0)[0]


def label_figures(z_VW: Tensor, label_ids_W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused.label_figures`, [W] each."""
    return _figures(z_VW, label_ids_W, 1.0, 1)


def row_best(z_VW: Tensor, label_ids_W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused.row_best`, [W] each."""
    return _figures(z_VW, label_ids_W, 1.0, 2)


def _figures(z_VW: Tensor, label_ids_W: Tensor | None, scale: float, kind: int) -> tuple[Tensor, Tensor, Tensor]:
    vocab, width = z_VW.shape
    spans, span = _spans(vocab)
    top_SW, total_SW = (z_VW.new_empty(spans, width) for _ in range(2))
    number_SW = torch.empty(spans, width, dtype=torch.int32, device=z_VW.device)
    lse_W, logp_W = z_VW.new_empty(width), z_VW.new_empty(width)
    number_W = torch.empty(width, dtype=torch.int64, device=z_VW.device)
    labels_W = number_W if label_ids_W is None else label_ids_W
    with torch.cuda.device_of(z_VW):
        _part_of_figures[(width // ROWS, spans)](
            *(z_VW, labels_W, top_SW, total_SW, number_SW, scale, z_VW.stride(0), width, vocab, span),
            KIND=kind, IDS=IDS, ROWS=ROWS, num_warps=4,
        )  # fmt: skip
        _whole_figures[(width // ROWS,)](
            *(z_VW, labels_W, top_SW, total_SW, number_SW, lse_W, logp_W, number_W, z_VW.stride(0), width, spans),
            KIND=kind, ROWS=ROWS, num_warps=2,
        )  # fmt: skip
    return lse_W, logp_W, number_W


def sum_classes(z_VW: Tensor, side: SortedIds, scale: float, width: int) -> Tensor:
    """As `kernels.sum_classes`, [K, W], of the first `width` rows."""
    class_KW = z_VW.new_empty(side.classes, width)
    alone, few, several, large = side.counts
    programs = large + -(-(few + several) // SOME) + -(-alone // IDS)
    with torch.cuda.device_of(z_VW):
        _sum[(width // ROWS, programs)](
            *(z_VW, side.ids_V, side.start_K1, side.by_size_K, side.alone_id_S, class_KW),
            *(z_VW.stride(0), width, scale, alone, few + several, large),
            SOME=SOME, IDS=IDS, ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return class_KW


def divergence_grad(
    teacher_KW: Tensor,
    teacher_lse_W: Tensor,
    z_KW: Tensor,
    lse_W: Tensor,
    factor_W: Tensor,
    spec: Divergence,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `fused.divergence_grad` without a cross-entropy: loss [W], and the gradient on z, [K, W]; 0 where the factor is.

    Args:
        teacher_KW: may have more rows than `z_KW`.
        teacher_lse_W, lse_W: log-sum-exps of logits * scale.
        factor_W: what the derivative on z * scale is multiplied by.
    """
    (classes, width), (spans, span) = z_KW.shape, _spans(z_KW.shape[0])
    grad_KW, loss_SW = torch.empty_like(z_KW), z_KW.new_empty(spans, width)
    kind, beta, norm = fused.as_mixture(spec)
    given = teacher_KW, teacher_lse_W, z_KW, lse_W, factor_W
    numbers = (scale, norm, beta, teacher_KW.stride(0), z_KW.stride(0), width, classes, span)
    mean_W = lse_W
    with torch.cuda.device_of(z_KW):
        if kind != fused.KINDS["forward_kl"]:  # of which it is known: see `fused`
            _divergence[(width // ROWS, spans)](
                *given, lse_W, loss_SW, grad_KW, *numbers, KIND=kind, SLOPES=True, IDS=IDS, ROWS=ROWS, num_warps=4
            )
            mean_W = loss_SW.sum(0)
        _divergence[(width // ROWS, spans)](
            *given, mean_W, loss_SW, grad_KW, *numbers, KIND=kind, SLOPES=False, IDS=IDS, ROWS=ROWS, num_warps=4
        )
    return loss_SW.sum(0), grad_KW


def gradient(
    z_VW: Tensor,
    lse_W: Tensor,
    scale_W: Tensor | None,
    label_ids_W: Tensor,
    prior_VW: Tensor | None,
    spread: ClassGradient | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `joined.kernels.gradient`, [V, W] in `dtype`; `spread` is of [K, W] matrices."""
    vocab, width = z_VW.shape
    grad_VW = torch.empty(vocab, width, dtype=dtype, device=z_VW.device)
    grad_KW, class_KW, coded_V, tempered = (z_VW, z_VW, label_ids_W, 1.0) if spread is None else spread
    with torch.cuda.device_of(z_VW):
        _gradient[(width // ROWS, -(-vocab // IDS))](
            *(z_VW, lse_W, lse_W if scale_W is None else scale_W, label_ids_W, z_VW if prior_VW is None else prior_VW),
            *(grad_KW, class_KW, coded_V, grad_VW, tempered, width, vocab),
            HARD=scale_W is not None, PRIOR=prior_VW is not None, SPREAD=spread is not None,
            IDS=IDS, ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return grad_VW


def _spans(ids: int) -> tuple[int, int]:
    """How many programs share the ids, and how many of them each goes through."""
    span = -(-ids // (SPANS * IDS)) * IDS
    return -(-ids // span), span


if triton is not None:

    @triton.jit
    def _together(top, total):
        """Of all lanes of each row."""
        highest = tl.max(top, 0)
        base = tl.where(highest == -float("inf"), 0.0, highest)
        return highest, tl.sum(total * tl.exp(top - base[None, :]), 0)

    @triton.jit
    def _part_of_figures(
        z_ptr, label_ptr, top_ptr, total_ptr, number_ptr, scale, z_step, width, vocab, span,
        KIND: tl.constexpr, IDS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        first = tl.program_id(1) * span
        top = tl.full((IDS, ROWS), -float("inf"), tl.float32)
        total = tl.zeros((IDS, ROWS), tl.float32)
        number = tl.zeros((IDS, ROWS), tl.int32)
        if KIND == 1:
            label = tl.load(label_ptr + place)
            label_z = tl.load(z_ptr + label * z_step + place)
        for begin in range(first, tl.minimum(first + span, vocab), IDS):
            ids = begin + tl.arange(0, IDS)
            z = tl.load(
                z_ptr + ids.to(tl.int64)[:, None] * z_step + place[None, :],
                mask=(ids < vocab)[:, None], other=-float("inf"),
            )  # fmt: skip
            if KIND == 1:
                before = (z > label_z[None, :]) | ((z == label_z[None, :]) & (ids[:, None] < label[None, :]))
                number += before.to(tl.int32)
            if KIND == 2:
                number = tl.where(z > top, ids[:, None], number)
                top, total = kernels.add_lanes(top, total, z)
            else:
                top, total = kernels.add_lanes(top, total, z * scale)
        at = tl.program_id(1) * width + place
        highest, whole = _together(top, total)
        tl.store(top_ptr + at, highest)
        tl.store(total_ptr + at, whole)
        if KIND == 1:
            tl.store(number_ptr + at, tl.sum(number, 0))
        if KIND == 2:
            tl.store(number_ptr + at, tl.min(tl.where(top == highest[None, :], number, 2147483647), 0))

    @triton.jit
    def _whole_figures(
        z_ptr, label_ptr, top_ptr, total_ptr, number_ptr, lse_ptr, logp_ptr, out_ptr, z_step, width, spans,
        KIND: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        top = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        number = tl.zeros((ROWS,), tl.int64)
        for span in range(spans):
            here = tl.load(top_ptr + span * width + place)
            if KIND == 1:
                number += tl.load(number_ptr + span * width + place).to(tl.int64)
            if KIND == 2:
                number = tl.where(here > top, tl.load(number_ptr + span * width + place).to(tl.int64), number)
            new_top = tl.maximum(top, here)
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            whole = tl.load(total_ptr + span * width + place)
            total = total * tl.exp(top - base) + whole * tl.exp(here - base)
            top = new_top
        lse = tl.log(total) + top
        tl.store(lse_ptr + place, lse)
        if KIND > 0:
            tl.store(logp_ptr + place, tl.load(z_ptr + tl.load(label_ptr + place) * z_step + place) - lse)
            tl.store(out_ptr + place, number)

    @triton.jit
    def _sum(
        z_ptr, ids_ptr, start_ptr, class_ptr, alone_ptr, out_ptr, z_step, out_step, scale, alone, some, large,
        SOME: tl.constexpr, IDS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        part = tl.program_id(1)
        tiles = (some + SOME - 1) // SOME
        if part < large:  # those that need the longest come first
            _large(
                z_ptr,
                ids_ptr,
                start_ptr,
                class_ptr + alone + some + part,
                out_ptr,
                z_step,
                out_step,
                scale,
                place,
                IDS,
                ROWS,
            )
        elif part < large + tiles:
            _some(
                z_ptr, ids_ptr, start_ptr, class_ptr + alone, out_ptr, z_step, out_step, scale, place,
                (part - large) * SOME, some, SOME, ROWS,
            )  # fmt: skip
        else:
            at = (part - large - tiles) * IDS + tl.arange(0, IDS)
            column = tl.load(class_ptr + at, mask=at < alone, other=0).to(tl.int64)
            ids = tl.load(alone_ptr + at, mask=at < alone, other=0).to(tl.int64)
            inside = (at < alone)[:, None]
            z = tl.load(z_ptr + ids[:, None] * z_step + place[None, :], mask=inside, other=0.0)
            tl.store(out_ptr + column[:, None] * out_step + place[None, :], z * scale, mask=inside)

    @triton.jit
    def _large(
        z_ptr, ids_ptr, start_ptr, class_ptr, out_ptr, z_step, out_step, scale, place, IDS: tl.constexpr, ROWS: tl.constexpr
    ):  # fmt: skip
        """One class; its ids in lines of a tile."""
        column = tl.load(class_ptr)
        start, stop = tl.load(start_ptr + column), tl.load(start_ptr + column + 1)
        top = tl.full((IDS, ROWS), -float("inf"), tl.float32)
        total = tl.zeros((IDS, ROWS), tl.float32)
        for first in range(start, stop, IDS):
            at = first + tl.arange(0, IDS)
            ids = tl.load(ids_ptr + at, mask=at < stop, other=0).to(tl.int64)
            z = tl.load(z_ptr + ids[:, None] * z_step + place[None, :], mask=(at < stop)[:, None], other=-float("inf"))
            top, total = kernels.add_lanes(top, total, z * scale)
        highest, whole = _together(top, total)
        tl.store(out_ptr + column.to(tl.int64) * out_step + place, tl.log(whole) + highest)

    @triton.jit
    def _some(
        z_ptr, ids_ptr, start_ptr, class_ptr, out_ptr, z_step, out_step, scale, place, first, count,
        SOME: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Classes of about the same size, each a line of a tile."""
        which = first + tl.arange(0, SOME)
        inside = which < count
        column = tl.load(class_ptr + which, mask=inside, other=0)
        start = tl.load(start_ptr + column, mask=inside, other=0)
        size = tl.load(start_ptr + column + 1, mask=inside, other=0) - start
        top = tl.full((SOME, ROWS), -float("inf"), tl.float32)
        total = tl.zeros((SOME, ROWS), tl.float32)
        for j in range(tl.max(size, 0)):
            own = inside & (j < size)
            ids = tl.load(ids_ptr + start + j, mask=own, other=0).to(tl.int64)
            z = tl.load(z_ptr + ids[:, None] * z_step + place[None, :], mask=own[:, None], other=-float("inf"))
            top, total = kernels.add_lanes(top, total, z * scale)
        there = out_ptr + column.to(tl.int64)[:, None] * out_step + place[None, :]
        tl.store(there, tl.log(total) + top, mask=inside[:, None])

    @triton.jit
    def _divergence(
        teacher_ptr, teacher_lse_ptr, z_ptr, lse_ptr, factor_ptr, mean_ptr, sum_ptr, grad_ptr,
        scale, norm, beta, teacher_step, z_step, width, classes, span,
        KIND: tl.constexpr, SLOPES: tl.constexpr, IDS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        first = tl.program_id(1) * span
        teacher_lse, lse = tl.load(teacher_lse_ptr + place)[None, :], tl.load(lse_ptr + place)[None, :]
        factor, mean = tl.load(factor_ptr + place)[None, :], tl.load(mean_ptr + place)[None, :]
        total = tl.zeros((IDS, ROWS), tl.float32)
        for begin in range(first, tl.minimum(first + span, classes), IDS):
            at = begin + tl.arange(0, IDS)
            inside, line = (at < classes)[:, None], at.to(tl.int64)[:, None]
            log_p = tl.load(teacher_ptr + line * teacher_step + place[None, :], mask=inside, other=-float("inf"))
            z = tl.load(z_ptr + line * z_step + place[None, :], mask=inside, other=-float("inf"))
            share, slope, q = fused._outcome(log_p * scale - teacher_lse, z * scale - lse, norm, beta, KIND)
            if SLOPES:
                total += slope
            else:
                total += share
                if KIND == 0:
                    grad = factor * (slope + q)
                else:
                    grad = tl.where(mean == float("inf"), 0.0, factor * (slope - q * mean))
                grad = tl.where(factor == 0, 0.0, grad)  # whatever the row holds
                tl.store(grad_ptr + line * z_step + place[None, :], grad, mask=inside)
        tl.store(sum_ptr + tl.program_id(1) * width + place, tl.sum(total, 0))

    @triton.jit
    def _gradient(
        z_ptr, lse_ptr, scale_ptr, label_ptr, prior_ptr, class_grad_ptr, whole_ptr, class_ptr, out_ptr, tempered, width, vocab,
        HARD: tl.constexpr, PRIOR: tl.constexpr, SPREAD: tl.constexpr, IDS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        place = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :]
        ids = tl.program_id(1) * IDS + tl.arange(0, IDS)
        inside, there = (ids < vocab)[:, None], ids.to(tl.int64)[:, None] * width + place
        z = tl.load(z_ptr + there, mask=inside, other=-float("inf"))
        grad = tl.zeros((IDS, ROWS), tl.float32)
        if PRIOR:
            grad += tl.load(prior_ptr + there, mask=inside, other=0.0)
        if HARD:
            onehot = (ids[:, None] == tl.load(label_ptr + place)).to(tl.float32)
            grad += tl.load(scale_ptr + place) * (tl.exp(z - tl.load(lse_ptr + place)) - onehot)
        if SPREAD:
            coded = tl.load(class_ptr + ids, mask=ids < vocab, other=0)
            line = (coded >> 1).to(tl.int64)[:, None] * width + place
            has_others = ((coded & 1) == 1)[:, None] & inside
            of_class = tl.load(class_grad_ptr + line, mask=inside, other=0.0)
            whole = tl.load(whole_ptr + line, mask=has_others, other=-float("inf"))
            whole = tl.where(has_others, whole, z * tempered)  # its share is 1
            empty = whole == -float("inf")  # a class without mass has no gradient either
            share = tl.where(empty, 0.0, tl.exp(z * tempered - tl.where(empty, 0.0, whole)))
            grad += tl.where(of_class == 0, 0.0, of_class * share)  # whatever the row holds
        tl.store(out_ptr + there, grad.to(out_ptr.dtype.element_ty), mask=inside)
