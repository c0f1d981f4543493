"""The loss on output distributions: teacher against student, and the data's own tokens, over chunks of rows.

In: the student's states after its final norm, its head, the teacher's rows. Out: one differentiable number, its parts.
Must never hold more than a chunk of logits, nor wait for the device: not at all if labels and weights are on the host,
else once, when the rows of weight 0 are dropped.

Axes: N rows, M rows of weight above 0, C rows of a chunk, V vocabulary rows, K kept ids, D width, R rank.
Source: docs/concepts/method.md 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.errors import ConfigError, DataError
from student_trainer.losses import fused
from student_trainer.losses.head import Head, if_trained
from student_trainer.losses.integrity import Integrity
from student_trainer.losses.matmul import wide
from student_trainer.losses.output.chunks import RowFigures, chunk_terms, fused_terms, has_kernel, is_short
from student_trainer.losses.output.gradients import Attach, Gradients
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import (
    EvidentRows,
    GivenRows,
    HiddenRows,
    Seen,
    TeacherRows,
    TopKRows,
    check_vocabulary,
)
from student_trainer.losses.truncated import check_temperature


@dataclass(frozen=True, eq=False)
class LossParts:
    """Sums over the rows of weight above 0, detached, on the device.

    Attributes:
        kd_sum: sum of w_n s(tau) D_n in nats, without kd_weight; 0 without a teacher. Of a policy gradient the surrogate, which is 0 in
            rows that were not sampled.
        ce_sum: sum of w_n (-log q(label)) in nats at temperature 1, without sft_weight; of the data's own tokens.
        acc1_hits, acc3_hits: rows whose label is the student's first, or among its first three.
        rows: how many there are.
        weights: sum of their weights.
        kd_weights, ce_weights: of the rows that kd_sum is a mean over (of several teachers' all rows), and of those in ce_sum.
        clipped: of those that a policy gradient has clipped.
    """

    kd_sum: Tensor
    ce_sum: Tensor
    acc1_hits: Tensor
    acc3_hits: Tensor
    rows: Tensor
    weights: Tensor
    kd_weights: Tensor
    ce_weights: Tensor
    clipped: Tensor


@dataclass(frozen=True, eq=False)
class OutputLoss:
    """`total` carries the graph; call `integrity.check()` before the optimizer's step (None without a teacher)."""

    total: Tensor
    parts: LossParts
    integrity: Integrity | None


def output_loss(
    student_hidden_ND: Tensor,
    head: Head,
    rows: TeacherRows | None,
    label_ids_N: Tensor,
    weights_N: Tensor,
    normalizer: float | Tensor,
    spec: OutputLossSpec,
    sampled_logp_N: Tensor | None = None,
) -> OutputLoss:
    """Distillation and cross-entropy of N rows.

    Args:
        student_hidden_ND: states after the final norm, any float dtype.
        head: the student's, sliced to the V of the labels. What of it requires a gradient gets one; the weight may be
            the embedding (tied).
        rows: the teacher's, in the same order; None for hard labels only (then kd_weight must be 0).
        label_ids_N: int64, the token each row describes; read where the weight is not 0. Beside the states, or on the host.
        weights_N: >= 0, where the labels are; rows of weight 0 are never projected.
        normalizer: Z of the whole accumulation window over all ranks, not of this call (docs/concepts/method.md 1.5).
        spec: what to compute.
        sampled_logp_N: where the labels are: log-probabilities that tokens of the student's own had when they were sampled, NaN for those
            of the data. None: all are the data's. A token of the student's own has no cross-entropy, a policy gradient no other rows.
    Returns:
        A loss whose gradients are computed here, in the forward pass, and scaled by grad_out in the backward pass.
        With no row left it is 0 and every gradient is 0.
    Raises:
        ConfigError: labels that do not determine the loss asked for.
        DataError: lengths, a vocabulary, a label or a weight that does not fit.
    """
    _check_call(student_hidden_ND, head, rows, label_ids_N, weights_N, spec, sampled_logp_N)
    kept_M = weights_N.detach().nonzero()[:, 0]  # if they are on the device, the one wait for it: shapes depend on it
    labels_M, weights_M, count = label_ids_N[kept_M], weights_N[kept_M], kept_M.numel()
    check_values(labels_M, weights_M, normalizer, head.vocab_rows)
    sampled_M = None if sampled_logp_N is None else sampled_logp_N[kept_M]
    if sampled_M is not None:
        check_sampled(sampled_M)
    kept_M, labels_M, weights_M = (beside(student_hidden_ND, t) for t in (kept_M, labels_M, weights_M))
    dtype = wide(student_hidden_ND, head.weight_VD)
    if sampled_M is not None:
        sampled_M = beside(student_hidden_ND, sampled_M).to(dtype)
    grad_dtype = torch.bfloat16 if narrow(student_hidden_ND, head) else dtype
    is_fused = dtype == torch.float32 and fused.usable(student_hidden_ND) and has_kernel(rows, spec)
    bytes_each = 16 if not is_fused else 4 + grad_dtype.itemsize + (0 if is_short(rows) else 4)
    chunk_rows = spec.chunk_rows(head.vocab_rows, bytes_each)
    trained = (if_trained(student_hidden_ND), *head.trained())
    gradients = Gradients(*(None if t is None else torch.zeros_like(t, dtype=dtype) for t in trained))
    figures: list[RowFigures] = []
    with torch.no_grad():
        coefficient_M = weights_M.to(dtype) / normalizer
        for start in range(0, count, chunk_rows):
            part = slice(start, min(start + chunk_rows, count))
            index_C = part if count == weights_N.numel() else kept_M[part]  # a slice of all is no copy and no launch
            h_CD, chunk = student_hidden_ND[index_C], rows and rows.take(index_C)
            z_CV, sampled_C = head.logits(h_CD), None if sampled_M is None else sampled_M[part]
            if is_fused:
                row, grad_CV = fused_terms(
                    z_CV, chunk, labels_M[part], coefficient_M[part], spec, grad_dtype, sampled_C
                )
            else:
                row, grad_CV = chunk_terms(z_CV, chunk, labels_M[part], coefficient_M[part], spec, sampled_C)
            figures.append(row)
            if any(t is not None for t in trained):
                gradients.add(head.pull_back_(grad_CV, z_CV), h_CD, index_C, head)
            del z_CV, grad_CV  # not held while the next chunk's are made
        own_M = weights_M if sampled_M is None else weights_M.masked_fill(~sampled_M.isnan(), 0)  # the data's
        kd_sum, ce_sum, acc1_hits, acc3_hits = _sums(figures, weights_M, own_M)
        total = (spec.kd_weight * kd_sum + spec.sft_weight * ce_sum) / (normalizer if count else 1)
    total = Attach.apply(total.to(dtype), *gradients.all(), *trained)
    weights = weights_M.double().sum()
    ce_weights = weights if sampled_M is None else own_M.double().sum()
    kd_weights, clipped = weights, torch.zeros_like(weights)
    if spec.policy_gradient is not None:
        kd_weights = clipped if sampled_M is None else weights - ce_weights
        if flags := [row.clipped_C for row in figures if row.clipped_C is not None]:
            clipped = weights_M.double() @ torch.cat(flags).double()
    count_of = torch.full_like(kd_sum, count)
    parts = LossParts(kd_sum, ce_sum, acc1_hits, acc3_hits, count_of, weights, kd_weights, ce_weights, clipped)
    if rows is None or isinstance(rows, GivenRows):
        return OutputLoss(total, parts, None)
    return OutputLoss(total, parts, _evidence(rows, kept_M, labels_M, figures))


def _sums(figures: list[RowFigures], weights_M: Tensor, own_M: Tensor) -> tuple[Tensor, ...]:
    """The four sums of `LossParts`, in float64; `own_M` are the weights of the cross-entropy."""
    if not figures:
        return weights_M.new_zeros(4, dtype=torch.float64).unbind()
    kd_M, ce_M, ahead_M = (torch.cat(column) for column in list(zip(*figures, strict=True))[:3])
    w_M = weights_M.double()
    return (
        w_M @ kd_M.double(),
        own_M.double() @ ce_M.double(),
        (ahead_M < 1).sum().double(),
        (ahead_M < 3).sum().double(),
    )


def narrow(hidden_ND: Tensor, head: Head) -> bool:
    """Whether every product that a gradient on the logits goes into would round it to bfloat16 (see `matmul`)."""
    plain = head.lora is None and head.bias_V is None and not head.final_softcap and head.logit_scale == 1.0
    return plain and hidden_ND.dtype == head.weight_VD.dtype == torch.bfloat16


def _evidence(rows: EvidentRows, kept_M: Tensor, labels_M: Tensor, figures: list[RowFigures]) -> Integrity:
    """What `Integrity.check` will look at, of the rows that were used; the comparison is under way already."""
    if isinstance(rows, TopKRows):
        seen = rows.take(kept_M).seen(labels_M)
    elif figures:
        seen = Seen(*(torch.cat(column) for column in zip(*(row.seen for row in figures if row.seen), strict=True)))
    else:
        seen = Seen(rows.lse_N[:0], rows.lse_N[:0])
    served = rows.lse_N[kept_M], rows.label_logp_N[kept_M]
    checked = rows.checked if isinstance(rows, HiddenRows) else None
    if checked is not None and kept_M.numel() < rows.lse_N.numel():
        # Rows without weight, which are rare, are left out: some of these may be among the checked.
        checked = int((~served[0].isnan()).sum())
    evidence = Integrity(kept_M, served[0], seen.lse_C, served[1], seen.label_logp_C, rows.tolerance, checked)
    evidence.begin()
    return evidence


def _check_call(
    hidden_ND: Tensor,
    head: Head,
    rows: TeacherRows | None,
    label_ids_N: Tensor,
    weights_N: Tensor,
    spec: OutputLossSpec,
    sampled_logp_N: Tensor | None,
) -> None:
    """What can be told from shapes and settings, without waiting for the device."""
    lengths = {"labels": label_ids_N.numel(), "weights": weights_N.numel(), "rows": rows and rows.lse_N.numel()}
    lengths |= {} if sampled_logp_N is None else {"sampled_logp": sampled_logp_N.numel()}
    for name, length in lengths.items():
        if length is not None and length != hidden_ND.shape[0]:
            raise DataError(f"{length} {name} for {hidden_ND.shape[0]} student states")
    if rows is None:
        if spec.kd_weight or not spec.sft_weight:
            raise ConfigError("without teacher rows set kd_weight to 0 and sft_weight above 0")
        return
    if isinstance(rows, GivenRows) and spec.policy_gradient is None:
        raise ConfigError(
            "given labels hold no distribution and serve divergence pg_rkl alone: choose another labels.transport"
        )
    transport = "top_k" if isinstance(rows, TopKRows) else "hidden or full"
    check_temperature(transport, spec.temperature, spec.tempered_head)
    check_vocabulary(rows, head)


def check_sampled(sampled_logp_M: Tensor) -> None:
    """Refuses figures that are neither NaN nor log-probabilities; read where they are, on the host in a run."""
    wrong = sampled_logp_M[(sampled_logp_M > 1e-3) | sampled_logp_M.isneginf()]
    if wrong.numel():
        raise DataError(
            f"sampled_logp must be log-probabilities, or NaN for tokens of the data, found {float(wrong[0]):g}"
        )


def beside(there: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` on the device of `there`; from the host it is on its way when this returns."""
    if tensor.device == there.device:
        return tensor
    return (tensor.pin_memory() if there.is_cuda else tensor).to(there.device, non_blocking=True)


def check_values(label_ids_N: Tensor, weights_N: Tensor, normalizer: float | Tensor, vocab_rows: int) -> None:
    """What must be read; if it is on the device, that has just been waited for, so this costs next to nothing."""
    if not label_ids_N.numel():
        return
    z = torch.as_tensor(normalizer, device=weights_N.device)
    extremes = [value.double() for value in (*label_ids_N.aminmax(), *weights_N.aminmax(), z)]
    low, high, lightest, heaviest, z_value = torch.stack(extremes).tolist()
    if low < 0 or high >= vocab_rows:
        raise DataError(f"label id {int(low if low < 0 else high)} lies outside 0..{vocab_rows - 1}, the student's V")
    if not 0 < lightest <= heaviest < float("inf"):
        raise DataError(f"weights must be finite and not negative, found {lightest:g} and {heaviest:g}")
    if not 0 < z_value < float("inf"):
        raise DataError(f"the normalizer must be finite and above 0, not {z_value:g}")
