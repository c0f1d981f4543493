"""The loss on output distributions: teacher against student, and the data's own tokens, over chunks of rows.

In: the student's states after its final norm, its head, the teacher's rows. Out: one differentiable number, its parts.
Must never hold more than a chunk of logits, nor wait for the device: not at all if labels and weights are on the host,
else once, when the rows of weight 0 are dropped.

Axes: N rows, M rows of weight above 0, C rows of a chunk, V vocabulary rows, K kept ids, D width, R rank.
Source: algorithms.md 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student_trainer.errors import ConfigError, DataError
from student_trainer.losses import fused
from student_trainer.losses.divergence import Divergence, divergence_and_grad
from student_trainer.losses.head import Head, if_trained
from student_trainer.losses.integrity import Integrity
from student_trainer.losses.matmul import add_outer, project, project_back, wide
from student_trainer.losses.rows import HiddenRows, Seen, TeacherRows, TopKRows, check_vocabulary, seen_in_logits
from student_trainer.losses.truncated import bucket_and_grad, check_temperature, tempered_head_and_grad


@dataclass(frozen=True)
class OutputLossSpec:
    """What is computed; total = (kd_weight * kd_sum + sft_weight * ce_sum) / normalizer.

    Attributes:
        divergence: of teacher and student.
        temperature: of the divergence; hard labels are always at 1.
        tau_squared: multiply the divergence, and so its gradient, by temperature squared (algorithms.md 1.4).
        kd_weight, sft_weight: of the two terms; a weight of 0 leaves the sum in the parts.
        tempered_head: the objective of `truncated.tempered_head_and_grad`, for top-k rows only.
        chunk_bytes: logits held at a time, roughly; sets the rows of a chunk.
    Raises:
        ConfigError: a number out of range.
    """

    divergence: Divergence = field(default_factory=Divergence)
    temperature: float = 1.0
    tau_squared: bool = False
    kd_weight: float = 1.0
    sft_weight: float = 0.0
    tempered_head: bool = False
    chunk_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        positive, weights = ("temperature", "chunk_bytes"), ("kd_weight", "sft_weight")
        for name in (*positive, *weights):
            value = getattr(self, name)
            if not (value > 0 or (name in weights and value == 0)):
                raise ConfigError(f"{name} must be {'at least' if name in weights else 'above'} 0, not {value}")

    def chunk_rows(self, vocab_rows: int, bytes_each: int = 16) -> int:
        """C: [C, V] fills `chunk_bytes`; four float32 buffers unless said otherwise (algorithms.md 3.3).

        Whole tiles of a matrix product where there are some.
        """
        rows = max(16, min(1024, self.chunk_bytes // (bytes_each * vocab_rows)))
        return rows - rows % 128 if rows > 128 else rows


@dataclass(frozen=True, eq=False)
class LossParts:
    """Sums over the rows of weight above 0, detached, on the device.

    Attributes:
        kd_sum: sum of w_n s(tau) D_n in nats, without kd_weight; 0 without a teacher.
        ce_sum: sum of w_n (-log q(label)) in nats at temperature 1, without sft_weight.
        acc1_hits, acc3_hits: rows whose label is the student's first, or among its first three.
        rows: how many there are.
        weights: sum of their weights.
    """

    kd_sum: Tensor
    ce_sum: Tensor
    acc1_hits: Tensor
    acc3_hits: Tensor
    rows: Tensor
    weights: Tensor


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
) -> OutputLoss:
    """Distillation and cross-entropy of N rows.

    Args:
        student_hidden_ND: states after the final norm, any float dtype.
        head: the student's, sliced to the V of the labels. What of it requires a gradient gets one; the weight may be
            the embedding (tied).
        rows: the teacher's, in the same order; None for hard labels only (then kd_weight must be 0).
        label_ids_N: int64, the token each row describes; read where the weight is not 0. Beside the states, or on the host.
        weights_N: >= 0, where the labels are; rows of weight 0 are never projected.
        normalizer: Z of the whole accumulation window over all ranks, not of this call (algorithms.md 1.5).
        spec: what to compute.
    Returns:
        A loss whose gradients are computed here, in the forward pass, and scaled by grad_out in the backward pass.
        With no row left it is 0 and every gradient is 0.
    Raises:
        ConfigError: labels that do not determine the loss asked for.
        DataError: lengths, a vocabulary, a label or a weight that does not fit.
    """
    _check_call(student_hidden_ND, head, rows, label_ids_N, weights_N, spec)
    kept_M = weights_N.detach().nonzero()[:, 0]  # if they are on the device, the one wait for it: shapes depend on it
    labels_M, weights_M, count = label_ids_N[kept_M], weights_N[kept_M], kept_M.numel()
    _check_values(labels_M, weights_M, normalizer, head.vocab_rows)
    kept_M, labels_M, weights_M = (_beside(student_hidden_ND, t) for t in (kept_M, labels_M, weights_M))
    dtype = wide(student_hidden_ND, head.weight_VD)
    grad_dtype = torch.bfloat16 if _narrow(student_hidden_ND, head) else dtype
    is_fused = dtype == torch.float32 and fused.usable(student_hidden_ND) and _has_kernel(rows, spec)
    bytes_each = 16 if not is_fused else 4 + grad_dtype.itemsize + (0 if _is_short(rows) else 4)
    chunk_rows = spec.chunk_rows(head.vocab_rows, bytes_each)
    trained = (if_trained(student_hidden_ND), *head.trained())
    gradients = _Gradients(*(None if t is None else torch.zeros_like(t, dtype=dtype) for t in trained))
    figures: list[_RowFigures] = []
    with torch.no_grad():
        coefficient_M = weights_M.to(dtype) / normalizer
        for start in range(0, count, chunk_rows):
            part = slice(start, min(start + chunk_rows, count))
            index_C = part if count == weights_N.numel() else kept_M[part]  # a slice of all is no copy and no launch
            h_CD, chunk = student_hidden_ND[index_C], rows and rows.take(index_C)
            z_CV = head.logits(h_CD)
            if is_fused:
                row, grad_CV = _fused_terms(z_CV, chunk, labels_M[part], coefficient_M[part], spec, grad_dtype)
            else:
                row, grad_CV = _chunk_terms(z_CV, chunk, labels_M[part], coefficient_M[part], spec)
            figures.append(row)
            if any(t is not None for t in trained):
                gradients.add(head.pull_back_(grad_CV, z_CV), h_CD, index_C, head)
            del z_CV, grad_CV  # not held while the next chunk's are made
        kd_sum, ce_sum, acc1_hits, acc3_hits = _sums(figures, weights_M)
        total = (spec.kd_weight * kd_sum + spec.sft_weight * ce_sum) / (normalizer if count else 1)
    total = _Attach.apply(total.to(dtype), *gradients.all(), *trained)
    parts = LossParts(kd_sum, ce_sum, acc1_hits, acc3_hits, torch.full_like(kd_sum, count), weights_M.double().sum())
    return OutputLoss(total, parts, None if rows is None else _evidence(rows, kept_M, labels_M, figures))


class _RowFigures(NamedTuple):
    """Of a chunk: both losses a row, ids before the label, and what the teacher's logits say of the label."""

    kd_C: Tensor
    ce_C: Tensor
    ahead_C: Tensor
    seen: Seen | None


def _sums(figures: list[_RowFigures], weights_M: Tensor) -> tuple[Tensor, ...]:
    """The four sums of `LossParts`, in float64."""
    if not figures:
        return weights_M.new_zeros(4, dtype=torch.float64).unbind()
    kd_M, ce_M, ahead_M = (torch.cat(column) for column in list(zip(*figures, strict=True))[:3])
    w_M = weights_M.double()
    return w_M @ kd_M.double(), w_M @ ce_M.double(), (ahead_M < 1).sum().double(), (ahead_M < 3).sum().double()


def _chunk_terms(
    z_CV: Tensor, chunk: TeacherRows | None, label_ids_C: Tensor, coefficient_C: Tensor, spec: OutputLossSpec
) -> tuple[_RowFigures, Tensor]:
    """Both terms from one set of logits, and the gradient on them with every factor in it; leaves `z_CV` as it is."""
    label_C1 = label_ids_C[:, None]
    log_q_CV = z_CV.log_softmax(-1)
    ce_C = -log_q_CV.gather(-1, label_C1)[:, 0]
    label_z_C1, ids_V = z_CV.gather(-1, label_C1), torch.arange(z_CV.shape[-1], device=z_CV.device)
    ahead_C = ((z_CV > label_z_C1) | ((z_CV == label_z_C1) & (ids_V < label_C1))).sum(-1)  # cheaper than a topk
    if chunk is None:
        kd_C, kd_grad_CV, seen = torch.zeros_like(ce_C), None, None
    else:
        kd_C, kd_grad_CV, seen = _kd(z_CV, log_q_CV, chunk, label_ids_C, spec)
        kd_grad_CV.mul_((spec.kd_weight * coefficient_C)[:, None])
    if spec.sft_weight or kd_grad_CV is None:
        sft_C1 = spec.sft_weight * coefficient_C[:, None]
        grad_CV = log_q_CV.exp_().mul_(sft_C1).scatter_add_(-1, label_C1, -sft_C1)  # (q - onehot), weighted
        kd_grad_CV = grad_CV if kd_grad_CV is None else kd_grad_CV.add_(grad_CV)
    return _RowFigures(kd_C, ce_C, ahead_C, seen), kd_grad_CV


def _kd(
    z_CV: Tensor, log_q_CV: Tensor, chunk: TeacherRows, label_ids_C: Tensor, spec: OutputLossSpec
) -> tuple[Tensor, Tensor, Seen | None]:
    """s(tau) D a row, its gradient on the student's logits, and the evidence; leaves its arguments as they are."""
    tau = spec.temperature
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


def _fused_terms(
    z_CV: Tensor,
    chunk: TeacherRows | None,
    label_ids_C: Tensor,
    coefficient_C: Tensor,
    spec: OutputLossSpec,
    grad_dtype: torch.dtype,
) -> tuple[_RowFigures, Tensor]:
    """What `_chunk_terms` computes, with kernels in place of passes over [C, V]."""
    kd_C, sft_C = spec.kd_weight * coefficient_C, spec.sft_weight * coefficient_C
    label_z_C = z_CV.gather(-1, label_ids_C[:, None])[:, 0]
    if isinstance(chunk, TopKRows):
        return _fused_bucket(z_CV, chunk, label_ids_C, label_z_C, kd_C, sft_C, spec, grad_dtype)
    lse_C, ahead_C = fused.row_figures(z_CV, label_ids_C, label_z_C)
    ce_C = lse_C - label_z_C
    if chunk is None:
        grad_CV = fused.softmax_grad(z_CV, lse_C, sft_C, label_ids_C, sft_C, grad_dtype)
        return _RowFigures(torch.zeros_like(ce_C), ce_C, ahead_C, None), grad_CV
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
    return _RowFigures(loss_C, ce_C, ahead_C, Seen(seen_lse_C, teacher_z_C - seen_lse_C)), grad_CV


def _fused_bucket(
    z_CV: Tensor,
    chunk: TopKRows,
    label_ids_C: Tensor,
    label_z_C: Tensor,
    kd_C: Tensor,
    sft_C: Tensor,
    spec: OutputLossSpec,
    grad_dtype: torch.dtype,
) -> tuple[_RowFigures, Tensor]:
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
    return _RowFigures(loss_C, lse_C - label_z_C, ahead_C, None), grad_CV


def _has_kernel(rows: TeacherRows | None, spec: OutputLossSpec) -> bool:
    """Whether `_fused_terms` knows this loss."""
    return not spec.tempered_head if _is_short(rows) else spec.divergence.kind in fused.KINDS


def _is_short(rows: TeacherRows | None) -> bool:
    """Without teacher logits [C, V]."""
    return rows is None or isinstance(rows, TopKRows)


def _narrow(hidden_ND: Tensor, head: Head) -> bool:
    """Whether every product that a gradient on the logits goes into would round it to bfloat16 (see `matmul`)."""
    plain = head.lora is None and head.bias_V is None and not head.final_softcap and head.logit_scale == 1.0
    return plain and hidden_ND.dtype == head.weight_VD.dtype == torch.bfloat16


@dataclass(frozen=True, eq=False)
class _Gradients:
    """Sums in the wide dtype, zero at first; None for what is not trained. Written once a row, summed over chunks."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    a_RD: Tensor | None
    b_VR: Tensor | None

    def all(self) -> tuple[Tensor | None, ...]:
        return self.hidden_ND, self.weight_VD, self.bias_V, self.a_RD, self.b_VR

    def add(self, grad_CV: Tensor, h_CD: Tensor, index_C: Tensor | slice, head: Head) -> None:
        """Adds a chunk's share; `grad_CV` is on h W^T (algorithms.md 3.2)."""
        lora = head.lora
        if self.weight_VD is not None:
            add_outer(self.weight_VD, grad_CV, h_CD)
        if self.bias_V is not None:
            self.bias_V.add_(grad_CV.sum(0))
        if self.hidden_ND is not None:
            self.hidden_ND[index_C] = project_back(grad_CV, head.weight_VD)
        if lora is None or (self.hidden_ND is None and self.a_RD is None and self.b_VR is None):
            return
        if self.b_VR is not None:
            add_outer(self.b_VR, grad_CV, lora.scaling * project(h_CD, lora.a_RD))
        grad_CR = lora.scaling * project_back(grad_CV, lora.b_VR)
        if self.a_RD is not None:
            add_outer(self.a_RD, grad_CR, h_CD)
        if self.hidden_ND is not None:
            self.hidden_ND[index_C] += project_back(grad_CR, lora.a_RD)


class _Attach(torch.autograd.Function):
    """Gives a number the gradients that were computed along with it."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *gradients_and_inputs: Tensor | None) -> Tensor:
        half = len(gradients_and_inputs) // 2
        ctx.save_for_backward(*gradients_and_inputs[:half])
        ctx.dtypes = [None if t is None else t.dtype for t in gradients_and_inputs[half:]]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        # Scaled before it is narrowed: a loss scaler exists because float16 cannot hold the unscaled ones.
        scaled = [None if sum_ is None else _scaled(sum_, grad_out, dtype) for sum_, dtype in saved]
        return (None, *(None for _ in scaled), *scaled)


def _scaled(wide_sum: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in `dtype`, without a wide copy in between."""
    return torch.mul(wide_sum, factor, out=torch.empty_like(wide_sum, dtype=dtype))


def _evidence(rows: TeacherRows, kept_M: Tensor, labels_M: Tensor, figures: list[_RowFigures]) -> Integrity:
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
        checked = int(
            (~served[0].isnan()).sum()
        )  # rows without weight, which are rare: some of these may have been checked
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
) -> None:
    """What can be told from shapes and settings, without waiting for the device."""
    lengths = {"labels": label_ids_N.numel(), "weights": weights_N.numel(), "rows": rows and rows.lse_N.numel()}
    for name, length in lengths.items():
        if length is not None and length != hidden_ND.shape[0]:
            raise DataError(f"{length} {name} for {hidden_ND.shape[0]} student states")
    if rows is None:
        if spec.kd_weight or not spec.sft_weight:
            raise ConfigError("without teacher rows set kd_weight to 0 and sft_weight above 0")
        return
    transport = "top_k" if isinstance(rows, TopKRows) else "hidden or full"
    check_temperature(transport, spec.temperature, spec.tempered_head)
    check_vocabulary(rows, head)


def _beside(there: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` on the device of `there`; from the host it is on its way when this returns."""
    if tensor.device == there.device:
        return tensor
    return (tensor.pin_memory() if there.is_cuda else tensor).to(there.device, non_blocking=True)


def _check_values(label_ids_N: Tensor, weights_N: Tensor, normalizer: float | Tensor, vocab_rows: int) -> None:
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
