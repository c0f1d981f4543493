"""The distillation loss for loops that are not ours, by the same formulas as a run: exact for `hidden`, K+1 outcomes for `top_k`.

In: the student's logits, or its states and its output head, and the teacher's labels; out: a number with gradients, and its parts.
From states logits are made in chunks and never held as a whole. Axes: B sequences, L padded length, N labelled rows, C rows of a
chunk, V ids of the labels, S >= V ids of the student, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.api.labels import Labels
from student_trainer.config.files import parse_as
from student_trainer.config.losses import OutputLossConfig
from student_trainer.errors import ConfigError, DataError
from student_trainer.losses import fused
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import Integrity, TeacherHeadMismatch
from student_trainer.losses.output.chunks import RowFigures, chunk_terms, fused_terms, has_kernel
from student_trainer.losses.output.gradients import Attach
from student_trainer.losses.output.loss import output_loss
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import GivenRows, HiddenRows, Seen, TeacherRows, TopKRows
from student_trainer.losses.truncated import check_temperature
from student_trainer.model import adapters, logit_probe
from student_trainer.teachers.loss_checks import divergence_of


@dataclass(frozen=True, eq=False)
class GkdLoss:
    """A loss and its parts; the parts carry no graph and stay on the student's device.

    Attributes:
        loss: [], (kd_weight * sum of kd + sft_weight * sum of ce) / normalizer; call `backward()` on it.
        kd: [], mean divergence of the labelled rows in nats, tau^2 included where asked for. With `forward_kl` at temperature 1 it is
            KL(teacher | student): exact, but of `top_k` labels a lower bound.
        ce: [], mean cross-entropy with the batch's own tokens in nats.
        acc1: [], share of rows whose token is the student's likeliest.
        rows: N.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    acc1: Tensor
    rows: int


def gkd_loss(
    student: Tensor,
    labels: Labels,
    *,
    head: Any = None,
    divergence: str = "forward_kl",
    beta: float | None = None,
    alpha: float | None = None,
    normalization: str | None = None,
    temperature: float = 1.0,
    tau_squared: bool = False,
    tempered_head: bool = False,
    kd_weight: float = 1.0,
    sft_weight: float = 0.0,
    normalizer: float | Tensor | None = None,
    chunk_mb: int = 256,
) -> GkdLoss:
    """Generalised knowledge distillation of one batch (docs/concepts/method.md 1-3).

    Args:
        student: logits [B, L, S] of the batch that the labels are of; with `head`, states [B, L, D] after the final norm instead.
            Row t is about token t+1, as models give it: do not shift.
        labels: from `Teacher.labels`.
        head: the student's output head: the model itself (scale, softcap and adapters of its head are found), or an `nn.Linear`.
        divergence, beta, alpha, normalization, temperature, tempered_head: as of `loss.output` of a run (docs/train/objectives.md);
            what belongs to another divergence is refused.
        tau_squared: multiply the divergence by temperature squared.
        kd_weight, sft_weight: of the divergence, and of the cross-entropy with the batch's own tokens (the labelled ones).
        normalizer: what the sums are divided by; None for N. Under gradient accumulation pass the labelled rows of the whole window,
            such as `num_items_in_batch` of transformers' Trainer.
        chunk_mb: MiB of logits that are made at a time.

    Raises:
        ConfigError: an argument out of range, or labels that do not determine this loss (`top_k` at another temperature than 1).
        DataError: a tensor that does not fit the labels.
        TeacherHeadMismatch: the labels are not this teacher's word on these tokens; found before any gradient is used, and those kept
            on disk since `connect` are deleted.
    """
    chosen = parse_as(
        OutputLossConfig,
        {
            "divergence": divergence, "beta": beta, "alpha": alpha, "normalization": normalization,
            "temperature": temperature, "tempered_head": tempered_head,
        },
        "gkd_loss",
    )  # fmt: skip
    if chosen.divergence == "pg_rkl":
        raise ConfigError(
            "gkd_loss: pg_rkl learns from samples of the student's own: use student_trainer.api.train with the section on_policy"
        )
    spec = OutputLossSpec(
        divergence_of(chosen), float(temperature), tau_squared, kd_weight, sft_weight, tempered_head,
        chunk_bytes=chunk_mb << 20,
    )  # fmt: skip
    if not isinstance(student, Tensor) or student.ndim != 3 or tuple(student.shape[:2]) != labels.shape:
        shown = list(student.shape) if isinstance(student, Tensor) else type(student).__name__
        kind = "logits" if head is None else "states"
        raise DataError(
            f"gkd_loss: the student's {kind} must be [B, L, ...] with B, L = {list(labels.shape)} as the labels' batch",
            value=shown,
        )
    count = len(labels)
    rows, index_N = labels.rows(student.device), labels.index_N.to(student.device)
    divisor = float(count) if normalizer is None else normalizer
    if head is None:
        return _finished(labels, *_of_logits(student, rows, index_N, labels, divisor, spec))
    found = output_loss(
        student.reshape(-1, student.shape[-1])[index_N],
        _sliced(_as_head(head), labels.vocab_rows),
        rows,
        labels.label_ids_N,
        torch.ones(count),
        divisor,
        spec,
    )
    assert found.integrity is not None, "labels that determine a divergence carry evidence"
    parts = found.parts
    sums = (parts.kd_sum, parts.ce_sum, parts.acc1_hits)
    return _finished(labels, found.total, sums, found.integrity)


def _finished(labels: Labels, loss: Tensor, sums: tuple[Tensor, Tensor, Tensor], evidence: Integrity) -> GkdLoss:
    """The result, once the evidence says that the labels are of these tokens."""
    try:
        evidence.check(labels.tally)
    except TeacherHeadMismatch as error:
        error.add_note(f"the row is of {labels.names_N(error.row)}")
        if told := labels.on_mismatch():
            error.add_note(told)
        raise
    count = len(labels)
    kd, ce, hits = (part / count for part in sums)
    return GkdLoss(loss, kd, ce, hits, count)


def _of_logits(
    logits_BLS: Tensor,
    rows: TeacherRows,
    index_N: Tensor,
    labels: Labels,
    normalizer: float | Tensor,
    spec: OutputLossSpec,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Integrity]:
    """Loss, sums of its parts and evidence from logits that are there already; the gradient is written by hand, chunk by chunk."""
    flat_RS = logits_BLS.reshape(-1, logits_BLS.shape[-1])
    vocab_rows, count = labels.vocab_rows, len(labels)
    _check_ids(flat_RS.shape[-1], vocab_rows)
    transport = "top_k" if isinstance(rows, TopKRows) else labels.transport
    check_temperature(transport, spec.temperature, spec.tempered_head)
    if not (z := float(normalizer)) > 0 or z == float("inf"):
        raise DataError(f"the normalizer must be finite and above 0, not {z:g}")
    wide = torch.float64 if flat_RS.dtype == torch.float64 else torch.float32
    is_trained = flat_RS.requires_grad and torch.is_grad_enabled()
    is_fused = wide is torch.float32 and fused.usable(flat_RS) and has_kernel(rows, spec)
    figures: list[RowFigures] = []
    label_ids_N = labels.label_ids_N.to(flat_RS.device)
    with torch.no_grad():
        grad_RS = torch.zeros_like(flat_RS, dtype=wide) if is_trained else None
        for start in range(0, count, spec.chunk_rows(vocab_rows)):
            part = slice(start, start + spec.chunk_rows(vocab_rows))
            z_CV = flat_RS[index_N[part], :vocab_rows].to(wide)
            chunk, label_C = rows.take(part), label_ids_N[part]
            scale_C = torch.full_like(z_CV[:, 0], 1 / z)
            if is_fused:
                row, grad_CV = fused_terms(z_CV, chunk, label_C, scale_C, spec, wide)
            else:
                row, grad_CV = chunk_terms(z_CV, chunk, label_C, scale_C, spec)
            figures.append(row)
            if grad_RS is not None:
                grad_RS[index_N[part], :vocab_rows] = grad_CV
        kd_N, ce_N, ahead_N = (torch.cat(column) for column in list(zip(*figures, strict=True))[:3])
        kd_sum, ce_sum, hits = kd_N.double().sum(), ce_N.double().sum(), (ahead_N < 1).sum().double()
        total = ((spec.kd_weight * kd_sum + spec.sft_weight * ce_sum) / z).to(wide)
    if grad_RS is not None:
        total = Attach.apply(total, grad_RS, flat_RS)
    return total, (kd_sum, ce_sum, hits), _evidence(rows, label_ids_N, figures)


def _evidence(rows: TeacherRows, label_ids_N: Tensor, figures: list[RowFigures]) -> Integrity:
    """What is held against the figures that the teacher has served."""
    if isinstance(rows, TopKRows):
        seen = rows.seen(label_ids_N)
    else:
        seen = Seen(*(torch.cat(column) for column in zip(*(row.seen for row in figures if row.seen), strict=True)))
    checked = rows.checked if isinstance(rows, HiddenRows) else None
    assert not isinstance(rows, GivenRows), "labels that determine a divergence carry evidence"
    row_N = torch.arange(rows.lse_N.numel(), device=rows.lse_N.device)
    return Integrity(row_N, rows.lse_N, seen.lse_C, rows.label_logp_N, seen.label_logp_C, rows.tolerance, checked)


def _as_head(head: Any) -> Head:
    """The student's output head as it is now: frozen, trained, tied or with adapters.

    Raises:
        ConfigError: nothing that is one.
    """
    if isinstance(head, Head):
        return head
    scale, softcap, layer = 1.0, 0.0, head
    if hasattr(head, "get_output_embeddings"):
        layer = head.get_output_embeddings()
        transform = logit_probe.transform_of(head.config)
        scale, softcap = transform.scale, transform.cap
    base = getattr(layer, "base_layer", layer)
    weight_VD = getattr(base, "weight", None) if isinstance(base, nn.Module) else None
    if not isinstance(weight_VD, Tensor):
        raise ConfigError(
            f"gkd_loss: head must be the student's model or its output head (an nn.Linear), not {type(head).__name__}"
        )
    return Head(weight_VD, getattr(base, "bias", None), scale, softcap, adapters.lora_of(layer))


def _sliced(head: Head, vocab_rows: int) -> Head:
    _check_ids(head.vocab_rows, vocab_rows)
    return head.slice(vocab_rows)


def _check_ids(ids: int, vocab_rows: int) -> None:
    if ids < vocab_rows:
        raise DataError(
            f"gkd_loss: the student has logits of {ids} ids and the labels are over {vocab_rows}: pass vocab_rows={ids} to connect"
        )
