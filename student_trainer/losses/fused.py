"""The passes over a chunk of logits, as Triton kernels: one program a row, nothing of [C, V] but what goes in and out.

In: float32 logits [C, V] on a CUDA device. Out: figures per row, and the gradient in the dtype it will be multiplied in.
Must never be the only way: `divergence.py` and `truncated.py` are the oracle, and what runs wherever `usable` says no.

Axes: C rows of a chunk, V vocabulary rows. Source: docs/concepts/method.md 1.1, 3.2. An outcome of probability 0 has weight 0.
"""

# mypy: disable-error-code="no-untyped-def"
# The kernels below are Triton's language, which has no types.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from student_trainer.losses.divergence import Divergence
from student_trainer.losses.matmul import empty_rows

try:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # a build of torch without CUDA
    triton = None

KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "skew_kl": 3, "skew_rkl": 4}  # `adaptive_kl` sorts
BLOCK = 4096  # logits of a row at a time


def usable(tensor: Tensor) -> bool:
    """Whether these kernels run where `tensor` is, on float32 logits."""
    return triton is not None and tensor.is_cuda


def row_figures(
    z_CV: Tensor, label_ids_C: Tensor, label_z_C: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of z / temperature (-inf if every logit is), and how many ids stand before the label (ties by id).

    `label_z_C`, the label's logit, is an argument because `z_CV` may hold -inf in its place.
    """
    lse_C, ahead_C = torch.empty_like(label_z_C), torch.empty_like(label_ids_C)
    _launch(_row_figures, z_CV, z_CV, label_ids_C, label_z_C, lse_C, lse_C, ahead_C, 1 / temperature, GIVEN=True)
    return lse_C, ahead_C


def label_figures(z_CV: Tensor, label_ids_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of each row, log-probability of its label, and how many ids stand before that."""
    lse_C, logp_C, ahead_C = z_CV.new_empty(len(z_CV)), z_CV.new_empty(len(z_CV)), torch.empty_like(label_ids_C)
    _launch(_row_figures, z_CV, z_CV, label_ids_C, lse_C, lse_C, logp_C, ahead_C, 1.0, GIVEN=False)
    return lse_C, logp_C, ahead_C


def row_lse(z_CV: Tensor) -> Tensor:
    """Log-sum-exp of each row; -inf if every logit is."""
    lse_C = z_CV.new_empty(len(z_CV))
    _launch(_row_best, z_CV, z_CV, lse_C, lse_C, lse_C, lse_C, ALL=False)
    return lse_C


def row_best(z_CV: Tensor, label_ids_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of each row, log-probability of its label, and int64, its likeliest id (the first of equal ones)."""
    lse_C, logp_C, best_C = z_CV.new_empty(len(z_CV)), z_CV.new_empty(len(z_CV)), torch.empty_like(label_ids_C)
    _launch(_row_best, z_CV, z_CV, label_ids_C, lse_C, logp_C, best_C, ALL=True)
    return lse_C, logp_C, best_C


def worst_row(
    row_N: Tensor,
    served_lse_N: Tensor,
    seen_lse_N: Tensor,
    served_logp_N: Tensor,
    seen_logp_N: Tensor,
    limits: tuple[float, float, float, float],
    gross: float,
    skips_nan: bool,
) -> tuple[Tensor, Tensor]:
    """What `Integrity` finds of its rows: float64 [7], rows out of tolerance, the worst one's number and four figures, and by how many tolerances it
    is off; and [2], the first of these again, and 1 if the last is above `gross`.

    Args:
        limits: `lse_abs`, `lse_rel`, `logp_abs` and `logp_rel` of a `Tolerance`.
        skips_nan: rows of which nothing is served are right.
    """
    told_9 = torch.empty(9, dtype=torch.float64, device=row_N.device)
    with torch.cuda.device_of(row_N):
        _worst_row[(1,)](
            *(row_N, served_lse_N, seen_lse_N, served_logp_N, seen_logp_N, told_9, *limits, gross, len(row_N)),
            SKIPS=skips_nan, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return told_9[:7], told_9[7:]


def softmax_grad(
    z_CV: Tensor, lse_C: Tensor, scale_C: Tensor, label_ids_C: Tensor, label_scale_C: Tensor, dtype: torch.dtype
) -> Tensor:
    """scale * exp(z - lse) - label_scale * onehot(label), [C, V] in `dtype`."""
    grad_CV = empty_rows(z_CV.shape, dtype, z_CV.device)
    _launch(_softmax_grad, z_CV, z_CV, lse_C, scale_C, label_ids_C, label_scale_C, grad_CV)
    return grad_CV


def divergence_grad(
    teacher_CV: Tensor,
    teacher_lse_C: Tensor,
    z_CV: Tensor,
    lse_C: Tensor,
    kd_scale_C: Tensor,
    spec: Divergence,
    temperature: float,
    lse_at_one_C: Tensor,
    label_ids_C: Tensor | None,
    sft_scale_C: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Divergence of softmax(z^T / tau) and softmax(z / tau) a row, and the gradient of both terms on z.

    Args:
        teacher_lse_C, lse_C: log-sum-exps of logits / temperature.
        kd_scale_C: what the derivative on z / tau is multiplied by, 1 / tau included.
        lse_at_one_C: of the student's logits at temperature 1, for the cross-entropy.
        label_ids_C, sft_scale_C: of the cross-entropy, its weight included, or None without one.
        dtype: of the gradient.
    Returns:
        loss_C in nats, without any factor; grad_CV, 0 where the divergence is infinite and has no derivative.
    """
    grad_CV, loss_C = empty_rows(z_CV.shape, dtype, z_CV.device), torch.empty_like(lse_C)
    kind, beta, norm = as_mixture(spec)
    label_ids_C = torch.empty_like(lse_C, dtype=torch.long) if label_ids_C is None else label_ids_C  # not read
    _launch(
        _divergence_grad,
        z_CV,
        *(teacher_CV, teacher_lse_C, z_CV, lse_C, kd_scale_C),
        *(lse_at_one_C, label_ids_C, kd_scale_C if sft_scale_C is None else sft_scale_C, loss_C, grad_CV),
        *(1 / temperature, norm, beta),
        KIND=kind,
        SFT=sft_scale_C is not None,
    )
    return loss_C, grad_CV


def as_mixture(spec: Divergence) -> tuple[int, float, float]:
    """The kernel's number of a divergence, the share of the teacher in m, and a factor; ends of `jsd` are the plain ones."""
    if spec.kind == "jsd" and spec.beta in (0, 1):
        return KINDS["forward_kl" if spec.beta == 0 else "reverse_kl"], 0.5, 1.0
    shares = {"jsd": spec.beta, "skew_kl": spec.alpha, "skew_rkl": 1 - spec.alpha}
    beta = shares.get(spec.kind, 0.5)
    is_unit = spec.kind == "jsd" and spec.normalization == "unit"
    return KINDS[spec.kind], beta, 1 / (beta * (1 - beta)) if is_unit else 1.0


def _launch(kernel: Any, z_CV: Tensor, *arguments: Any, **constants: Any) -> None:
    """Behind the arguments come the steps between the rows of all matrices among them."""
    rows, vocab = z_CV.shape
    tensors = [there for there in arguments if isinstance(there, Tensor)]
    assert all(there.stride(-1) == 1 or there.shape[-1] == 1 for there in tensors), "kernels go along rows"
    steps = [there.stride(0) for there in tensors if there.dim() == 2]
    with torch.cuda.device_of(z_CV):
        kernel[(rows,)](*arguments, *steps, VOCAB=vocab, **constants, BLOCK=BLOCK, num_warps=8)


if triton is not None:

    @triton.jit
    def add_block(top, total, z):
        """The largest logit so far, and the sum of exp(logit - largest), with one more block of logits."""
        new_top = tl.maximum(top, tl.max(z, 0))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing but -inf so far
        return new_top, total * tl.exp(top - base) + tl.sum(tl.exp(z - base), 0)

    @triton.jit
    def _row_figures(
        z_ptr, label_ptr, label_z_ptr, lse_ptr, logp_ptr, ahead_ptr, scale, z_step,
        VOCAB: tl.constexpr, GIVEN: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        z_ptr += row * z_step
        label = tl.load(label_ptr + row)
        label_z = tl.load(label_z_ptr + row) if GIVEN else tl.load(z_ptr + label)
        top = -float("inf")
        total = 0.0
        ahead = 0
        for start in range(0, VOCAB, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + ids, mask=ids < VOCAB, other=-float("inf"))
            before = (z > label_z) | ((z == label_z) & (ids < label))
            ahead += tl.sum(before.to(tl.int32))
            top, total = add_block(top, total, z * scale)
        lse = tl.log(total) + tl.where(top == -float("inf"), 0.0, top)
        if not GIVEN:
            tl.store(logp_ptr + row, label_z - lse)
        tl.store(lse_ptr + row, lse)
        tl.store(ahead_ptr + row, ahead)

    @triton.jit
    def _row_best(
        z_ptr, label_ptr, lse_ptr, logp_ptr, best_ptr, z_step,
        VOCAB: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        z_ptr += row * z_step
        top = -float("inf")
        total = 0.0
        best = 0
        for start in range(0, VOCAB, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + ids, mask=ids < VOCAB, other=-float("inf"))
            if ALL:
                here = tl.max(z)
                best = tl.where(here > top, tl.min(tl.where(z == here, ids, VOCAB)), best)
            top, total = add_block(top, total, z)
        lse = tl.log(total) + tl.where(top == -float("inf"), 0.0, top)
        tl.store(lse_ptr + row, lse)
        if ALL:
            tl.store(logp_ptr + row, tl.load(z_ptr + tl.load(label_ptr + row)) - lse)
            tl.store(best_ptr + row, best)

    @triton.jit
    def _worst_row(
        row_ptr, served_lse_ptr, seen_lse_ptr, served_logp_ptr, seen_logp_ptr, told_ptr,
        lse_abs, lse_rel, logp_abs, logp_rel, gross, count, SKIPS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        failing = tl.zeros((), tl.int32)
        worst = tl.full((), -1.0, tl.float32)
        at_worst = tl.zeros((), tl.int32)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < count
            served = tl.load(served_lse_ptr + at, mask=inside, other=0.0)
            size = tl.abs(served)
            lse = tl.abs(tl.load(seen_lse_ptr + at, mask=inside, other=0.0) - served) / (lse_abs + lse_rel * size)
            logp = tl.load(seen_logp_ptr + at, mask=inside, other=0.0)
            logp = tl.abs(logp - tl.load(served_logp_ptr + at, mask=inside, other=0.0)) / (logp_abs + logp_rel * size)
            error = tl.where((lse != lse) | (logp != logp), float("inf"), tl.maximum(lse, logp))  # NaN is never right
            error = tl.where(inside, error, -1.0)
            if SKIPS:
                error = tl.where(served != served, 0.0, error)
            failing += tl.sum((error > 1).to(tl.int32))
            here = tl.max(error)
            at_worst = tl.where(here > worst, tl.min(tl.where(error == here, at, count)), at_worst)
            worst = tl.maximum(worst, here)
        tl.store(told_ptr, failing.to(tl.float64))
        tl.store(told_ptr + 1, tl.load(row_ptr + at_worst).to(tl.float64))
        tl.store(told_ptr + 2, tl.load(served_lse_ptr + at_worst).to(tl.float64))
        tl.store(told_ptr + 3, tl.load(seen_lse_ptr + at_worst).to(tl.float64))
        tl.store(told_ptr + 4, tl.load(served_logp_ptr + at_worst).to(tl.float64))
        tl.store(told_ptr + 5, tl.load(seen_logp_ptr + at_worst).to(tl.float64))
        tl.store(told_ptr + 6, worst.to(tl.float64))
        tl.store(told_ptr + 7, failing.to(tl.float64))
        tl.store(told_ptr + 8, (worst > gross).to(tl.float64))

    @triton.jit
    def _softmax_grad(
        z_ptr, lse_ptr, scale_ptr, label_ptr, label_scale_ptr, grad_ptr, z_step, grad_step,
        VOCAB: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        lse, scale = tl.load(lse_ptr + row), tl.load(scale_ptr + row)
        label, label_scale = tl.load(label_ptr + row), tl.load(label_scale_ptr + row)
        for start in range(0, VOCAB, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + row * z_step + ids, mask=ids < VOCAB, other=-float("inf"))
            grad = scale * tl.exp(z - lse) - tl.where(ids == label, label_scale, 0.0)
            tl.store(grad_ptr + row * grad_step + ids, grad.to(grad_ptr.dtype.element_ty), mask=ids < VOCAB)

    @triton.jit
    def _outcome(log_p, log_q, norm, beta, KIND: tl.constexpr):
        """An outcome's share of the divergence, and q times the divergence's slope in q (up to a constant)."""
        p, q = tl.exp(log_p), tl.exp(log_q)
        if KIND == 0:  # forward KL
            return tl.where(p == 0, 0.0, p * (log_p - log_q)), -p, q
        if KIND == 1:  # reverse KL
            share = tl.where(q == 0, 0.0, q * (log_q - log_p))
            return share, share, q
        a, b = log_p + tl.log(beta), log_q + tl.log(1 - beta)
        high = tl.maximum(a, b)
        log_m = high + tl.log(1 + tl.exp(tl.minimum(a, b) - high))
        to_teacher = tl.where(p == 0, 0.0, p * (log_p - log_m))
        to_student = tl.where(q == 0, 0.0, q * (log_q - log_m))
        if KIND == 2:  # Jensen-Shannon
            share = norm * (beta * to_teacher + (1 - beta) * to_student)
            slope = norm * (1 - beta) * to_student
            return share, slope, q
        if KIND == 3:  # KL(p | alpha p + (1 - alpha) q)
            slope = tl.where(p == 0, 0.0, (beta - 1) * q * tl.exp(log_p - log_m))
            return to_teacher, slope, q
        slope = to_student - tl.where(q == 0, 0.0, (1 - beta) * q * tl.exp(log_q - log_m))
        return to_student, slope, q  # KL(q | (1 - alpha) p + alpha q), beta = 1 - alpha

    @triton.jit
    def _divergence_grad(
        teacher_ptr, teacher_lse_ptr, z_ptr, lse_ptr, kd_ptr, lse_at_one_ptr, label_ptr, sft_ptr, loss_ptr, grad_ptr,
        scale, norm, beta, teacher_step, z_step, grad_step,
        VOCAB: tl.constexpr, KIND: tl.constexpr, SFT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        teacher_ptr += row * teacher_step
        z_ptr += row * z_step
        teacher_lse, lse, kd = tl.load(teacher_lse_ptr + row), tl.load(lse_ptr + row), tl.load(kd_ptr + row)
        loss = 0.0
        mean = 0.0  # of the slope under q
        if KIND == 0:
            mean = -1.0  # of -p / q: known beforehand, so that one pass is enough
        else:
            for start in range(0, VOCAB, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                log_p = tl.load(teacher_ptr + ids, mask=ids < VOCAB, other=-float("inf")) * scale - teacher_lse
                log_q = tl.load(z_ptr + ids, mask=ids < VOCAB, other=-float("inf")) * scale - lse
                _, slope, _ = _outcome(log_p, log_q, norm, beta, KIND)
                mean += tl.sum(slope)
        for start in range(0, VOCAB, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            log_p = tl.load(teacher_ptr + ids, mask=ids < VOCAB, other=-float("inf")) * scale - teacher_lse
            z = tl.load(z_ptr + ids, mask=ids < VOCAB, other=-float("inf"))
            share, slope, q = _outcome(log_p, z * scale - lse, norm, beta, KIND)
            loss += tl.sum(share)
            grad = kd * (slope - q * mean)
            if KIND != 0:
                grad = tl.where(mean == float("inf"), 0.0, grad)
            if SFT:
                q_at_one = tl.exp(z - tl.load(lse_at_one_ptr + row))
                grad += tl.load(sft_ptr + row) * (q_at_one - (ids == tl.load(label_ptr + row)).to(tl.float32))
            tl.store(grad_ptr + row * grad_step + ids, grad.to(grad_ptr.dtype.element_ty), mask=ids < VOCAB)
        tl.store(loss_ptr + row, loss)
