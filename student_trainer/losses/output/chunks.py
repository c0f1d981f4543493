"""One chunk of rows: both losses per row, the student's hits, and the gradient on its logits.

In: logits [C, V], the teacher's rows, labels and weights of the same rows. Out: figures per row, and dL/dz with every factor in it.
Must never touch a head or a parameter: `loss.py` runs over chunks and pulls the gradients back.

Axes: C rows of a chunk, V vocabulary rows, K kept ids.
Source: docs/concepts/method.md 2, 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from student_trainer.losses import fused
from student_trainer.losses.divergence import divergence_and_grad
from student_trainer.losses.output.policy_gradient import PolicyGradient, Surrogate, surrogate
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import GivenRows, Seen, TeacherRows, TopKRows, seen_in_logits
from student_trainer.losses.truncated import bucket_and_grad, tempered_head_and_grad


class RowFigures(NamedTuple):
    """Of a chunk: both losses a row, ids before the label, what the teacher's logits say of the label, and rows that were clipped."""

    kd_C: Tensor
    ce_C: Tensor
    ahead_C: Tensor
    seen: Seen | None
    clipped_C: Tensor | None = None


def chunk_terms(
    z_CV: Tensor,
    chunk: TeacherRows | None,
    label_ids_C: Tensor,
    coefficient_C: Tensor,
    spec: OutputLossSpec,
    sampled_logp_C: Tensor | None = None,
) -> tuple[RowFigures, Tensor]:
    """Both terms from one set of logits, and the gradient on them with every factor in it; leaves `z_CV` as it is.

    Args:
        sampled_logp_C: of labels that the student has sampled, when it did; NaN for the data's own. None: all are the data's.
    """
    label_C1 = label_ids_C[:, None]
    log_q_CV = z_CV.log_softmax(-1)
    ce_C = -log_q_CV.gather(-1, label_C1)[:, 0]
    label_z_C1, ids_V = z_CV.gather(-1, label_C1), torch.arange(z_CV.shape[-1], device=z_CV.device)
    ahead_C = ((z_CV > label_z_C1) | ((z_CV == label_z_C1) & (ids_V < label_C1))).sum(-1)  # cheaper than a topk
    clipped_C = None
    if chunk is None:
        kd_C, kd_grad_CV, seen = torch.zeros_like(ce_C), None, None
    elif spec.policy_gradient is not None:
        found, seen = on_samples(-ce_C, sampled_logp_C, chunk, label_ids_C, z_CV.dtype, spec.policy_gradient)
        kd_C, clipped_C = found.loss_C, found.clipped_C
        slope_C1 = (found.slope_C * spec.kd_weight * coefficient_C)[:, None]
        kd_grad_CV = log_q_CV.exp().mul_(-slope_C1).scatter_add_(-1, label_C1, slope_C1)  # slope (onehot - q)
    else:
        kd_C, kd_grad_CV, seen = kd_terms(z_CV, log_q_CV, chunk, label_ids_C, spec)
        kd_grad_CV.mul_((spec.kd_weight * coefficient_C)[:, None])
    if spec.sft_weight or kd_grad_CV is None:
        sft_C1 = _sft_scale(spec, coefficient_C, sampled_logp_C)[:, None]
        grad_CV = log_q_CV.exp_().mul_(sft_C1).scatter_add_(-1, label_C1, -sft_C1)  # (q - onehot), weighted
        kd_grad_CV = grad_CV if kd_grad_CV is None else kd_grad_CV.add_(grad_CV)
    return RowFigures(kd_C, ce_C, ahead_C, seen, clipped_C), kd_grad_CV


def _sft_scale(spec: OutputLossSpec, coefficient_C: Tensor, sampled_logp_C: Tensor | None) -> Tensor:
    """Weight of each row's cross-entropy, with every factor: 0 for a token that the student itself has sampled."""
    scale_C = spec.sft_weight * coefficient_C
    return scale_C if sampled_logp_C is None else scale_C.masked_fill(~sampled_logp_C.isnan(), 0)


def on_samples(
    log_q_C: Tensor,
    sampled_logp_C: Tensor | None,
    chunk: TeacherRows,
    label_ids_C: Tensor,
    dtype: torch.dtype,
    how: PolicyGradient,
) -> tuple[Surrogate, Seen | None]:
    """The surrogate of each row, and the evidence where the teacher's logits are there."""
    seen = None if isinstance(chunk, TopKRows | GivenRows) else seen_in_logits(chunk.logits(dtype), label_ids_C)
    teacher_logp_C = chunk.label_logp_N.to(log_q_C.dtype) if seen is None else seen.label_logp_C
    if sampled_logp_C is None:
        sampled_logp_C = torch.full_like(log_q_C, torch.nan)
    return surrogate(log_q_C, sampled_logp_C, teacher_logp_C, how), seen


def kd_terms(
    z_CV: Tensor, log_q_CV: Tensor, chunk: TeacherRows, label_ids_C: Tensor, spec: OutputLossSpec
) -> tuple[Tensor, Tensor, Seen | None]:
    """s(tau) D a row, its gradient on the student's logits, and the evidence; leaves its arguments as they are."""
    tau = spec.temperature
    assert not isinstance(chunk, GivenRows), "refused before"
    if isinstance(chunk, TopKRows):
        ids_CK, labels = chunk.topk_ids_NK, chunk.bucket(z_CV.dtype)
        if spec.tempered_head:
            kd = tempered_head_and_grad(ids_CK, *labels, log_q_CV, tau, spec.tau_squared, spec.divergence)
        else:
            kd = bucket_and_grad(ids_CK, *labels, log_q_CV, spec.divergence)
        return *kd, None  # `_evidence` sees it without logits
    teacher_CV = chunk.logits(z_CV.dtype)
    seen = seen_in_logits(teacher_CV, label_ids_C)
    log_p_CV = (teacher_CV / tau).log_softmax(-1)
    del teacher_CV
    loss_C, grad_CV = divergence_and_grad(
        log_p_CV, log_q_CV if tau == 1 else (z_CV / tau).log_softmax(-1), spec.divergence
    )
    scale = tau**2 if spec.tau_squared else 1.0
    return loss_C * scale, grad_CV.mul_(scale / tau), seen


def fused_terms(
    z_CV: Tensor,
    chunk: TeacherRows | None,
    label_ids_C: Tensor,
    coefficient_C: Tensor,
    spec: OutputLossSpec,
    grad_dtype: torch.dtype,
    sampled_logp_C: Tensor | None = None,
) -> tuple[RowFigures, Tensor]:
    """What `chunk_terms` computes, with kernels in place of passes over [C, V]."""
    kd_C, sft_C = spec.kd_weight * coefficient_C, _sft_scale(spec, coefficient_C, sampled_logp_C)
    label_z_C = z_CV.gather(-1, label_ids_C[:, None])[:, 0]
    if chunk is not None and spec.policy_gradient is not None:
        lse_C, ahead_C = fused.row_figures(z_CV, label_ids_C, label_z_C)
        log_q_C = label_z_C - lse_C
        found, seen = on_samples(log_q_C, sampled_logp_C, chunk, label_ids_C, z_CV.dtype, spec.policy_gradient)
        scale_C = sft_C - kd_C * found.slope_C
        grad_CV = fused.softmax_grad(z_CV, lse_C, scale_C, label_ids_C, scale_C, grad_dtype)
        return RowFigures(found.loss_C, -log_q_C, ahead_C, seen, found.clipped_C), grad_CV
    assert not isinstance(chunk, GivenRows), "`has_kernel` says no"
    if isinstance(chunk, TopKRows):
        return _fused_bucket(z_CV, chunk, label_ids_C, label_z_C, kd_C, sft_C, spec, grad_dtype)
    lse_C, ahead_C = fused.row_figures(z_CV, label_ids_C, label_z_C)
    ce_C = lse_C - label_z_C
    if chunk is None:
        grad_CV = fused.softmax_grad(z_CV, lse_C, sft_C, label_ids_C, sft_C, grad_dtype)
        return RowFigures(torch.zeros_like(ce_C), ce_C, ahead_C, None), grad_CV
    tau, teacher_CV = spec.temperature, chunk.logits(z_CV.dtype)
    teacher_z_C = teacher_CV.gather(-1, label_ids_C[:, None])[:, 0]
    seen_lse_C = teacher_lse_C = fused.row_figures(teacher_CV, label_ids_C, teacher_z_C)[0]
    tempered_C = lse_C
    if tau != 1:
        teacher_lse_C = fused.row_figures(teacher_CV, label_ids_C, teacher_z_C, tau)[0]
        tempered_C = fused.row_figures(z_CV, label_ids_C, label_z_C, tau)[0]
    scale = tau**2 if spec.tau_squared else 1.0
    loss_C, grad_CV = fused.divergence_grad(
        *(teacher_CV, teacher_lse_C, z_CV, tempered_C, kd_C * (scale / tau), spec.divergence, tau),
        *(lse_C, label_ids_C, sft_C if spec.sft_weight else None, grad_dtype),
    )
    loss_C = loss_C if scale == 1 else loss_C * scale
    return RowFigures(loss_C, ce_C, ahead_C, Seen(seen_lse_C, teacher_z_C - seen_lse_C)), grad_CV


def _fused_bucket(
    z_CV: Tensor,
    chunk: TopKRows,
    label_ids_C: Tensor,
    label_z_C: Tensor,
    kd_C: Tensor,
    sft_C: Tensor,
    spec: OutputLossSpec,
    grad_dtype: torch.dtype,
) -> tuple[RowFigures, Tensor]:
    """`truncated.bucket_and_grad` and the cross-entropy: outside the kept ids both are multiples of the student."""
    ids_CK, label_C1 = chunk.topk_ids_NK, label_ids_C[:, None]
    z_CK = z_CV.gather(-1, ids_CK)
    z_CV.scatter_(-1, ids_CK, -torch.inf)
    rest_C, ahead_C = fused.row_figures(z_CV, label_ids_C, label_z_C)
    ahead_C += ((z_CK > label_z_C[:, None]) | ((z_CK == label_z_C[:, None]) & (ids_CK < label_C1))).sum(-1)
    lse_C = torch.logaddexp(rest_C, z_CK.logsumexp(-1))
    topk_logp_CK, tail_logp_C = chunk.bucket(z_CV.dtype)
    log_q_CK = z_CK - lse_C[:, None]
    loss_C, slope_CK1 = divergence_and_grad(
        torch.cat([topk_logp_CK, tail_logp_C[:, None]], -1),
        torch.cat([log_q_CK, (rest_C - lse_C)[:, None]], -1),
        spec.divergence,
    )
    empty_C = torch.isneginf(rest_C)  # K = V: no tail token, and a slope that may be NaN
    tail_C = (kd_C * slope_CK1[:, -1] + sft_C * (rest_C - lse_C).exp()).masked_fill_(empty_C, 0)
    grad_CV = fused.softmax_grad(z_CV, rest_C.masked_fill(empty_C, 0), tail_C, label_ids_C, sft_C, grad_dtype)
    z_CV.scatter_(-1, ids_CK, z_CK)
    onehot_CK = (ids_CK == label_C1).to(z_CV.dtype)
    kept_CK = kd_C[:, None] * slope_CK1[:, :-1] + sft_C[:, None] * (log_q_CK.exp() - onehot_CK)
    grad_CV.scatter_(-1, ids_CK, kept_CK.to(grad_dtype))
    return RowFigures(loss_C, lse_C - label_z_C, ahead_C, None), grad_CV


def has_kernel(rows: TeacherRows | None, spec: OutputLossSpec) -> bool:
    """Whether `fused_terms` knows this loss."""
    if spec.policy_gradient is not None:
        return True
    if isinstance(rows, GivenRows):
        return False
    return not spec.tempered_head if is_short(rows) else spec.divergence.kind in fused.KINDS


def is_short(rows: TeacherRows | None) -> bool:
    """Without teacher logits [C, V]."""
    return rows is None or isinstance(rows, TopKRows | GivenRows)
