"""The refusals: no label row reaches a loss unless it can be what it claims to be.

In: an answer and what was asked; out: nothing, or a LabelError that names the sample and the row. What can be
checked from the answer alone is checked here, for every row; the head-dependent check of `hidden` rows
(lse and label recomputed from the state) happens where the logits are made, in losses.

Axes: N rows, K kept ids, V vocabulary rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from teacher_wire.errors import LabelError
from teacher_wire.messages import SignalSpec, TeacherSignals, Tensor, TokenBatch

# Probabilities that must sum to 1, and figures computed twice: float32 log-sums over bf16 logits (algorithms.md 3.6).
MASS_TOLERANCE = 1e-3
LSE_TOLERANCE = (0.02, 0.002)  # absolute, relative
LOGP_TOLERANCE = 0.05
_BF16_MAGNITUDE, _BF16_INFINITY = np.uint16(0x7FFF), np.uint16(0x7F80)


def check_signals(signals: TeacherSignals, spec: SignalSpec, batch: TokenBatch, names: Sequence[str]) -> None:
    """Checks every row of an answer.

    Args:
        signals: what came.
        spec: what was asked.
        batch: for which tokens.
        names: of the B sequences, for the error.

    Raises:
        LabelError: naming sample, row within the sample, field, value and limit.
    """
    report = _Reporter(batch, names)
    if signals.rows != batch.rows:
        raise LabelError("wrong number of rows", field="rows", value=signals.rows, limit=batch.rows)
    lse_N = signals.lse_N.array
    label_N = signals.label_logp_N.array
    report.refuse(~np.isfinite(lse_N), "lse", "not a finite number", lse_N)
    report.refuse(~np.isfinite(label_N) | (label_N > 1e-4), "label_logp", "not a log-probability", label_N)
    if spec.transport == "top_k":
        _check_top_k(signals, spec, batch, report)
    elif spec.transport == "full":
        _check_full(signals, batch, report)
    for name in ("hidden_ND", "state_scales_NG", "outlier_values_NO"):
        found = signals.tensors().get(name)
        if found is not None:
            report.refuse(_not_finite(found), name, "holds NaN or infinity", lse_N)
    if signals.outlier_ids_NO is not None:
        top_N = signals.outlier_ids_NO.array.max(-1)
        assert signals.state_int8_ND is not None
        width = signals.state_int8_ND.shape[1]
        report.refuse(top_N >= width, "outlier_ids", "a channel outside the state", top_N, width - 1)


def _not_finite(tensor: Tensor) -> np.ndarray:
    """bool [N]: rows that hold NaN or infinity. By exponent bits where they are at hand: converting takes five times as long."""
    if tensor.dtype == "bfloat16":
        found: np.ndarray = np.bitwise_and(tensor.array, _BF16_MAGNITUDE).max(-1) >= _BF16_INFINITY
        return found
    return ~np.isfinite(tensor.array).all(-1)


class _Reporter:
    """Turns a mask of bad rows into an error that names the first."""

    def __init__(self, batch: TokenBatch, names: Sequence[str]) -> None:
        self._batch = batch
        self._names = names

    def refuse(self, bad_N: Any, field: str, complaint: str, value_N: np.ndarray, limit: object = "") -> None:
        if not bad_N.any():
            return
        row = int(np.argmax(bad_N))
        sequence = self._batch.sequence_of_row(row)
        token = int(self._batch.rows_of()[row] - self._batch.cu_lengths_B1[sequence])
        raise LabelError(
            f"the teacher's labels for {self._names[sequence]}, row {token}: {complaint} ({int(bad_N.sum())} of {bad_N.size} rows)",
            field=field, value=value_N[row], limit=limit,
        )  # fmt: skip


def _check_top_k(signals: TeacherSignals, spec: SignalSpec, batch: TokenBatch, report: _Reporter) -> None:
    assert signals.topk_ids_NK is not None and signals.topk_logits_NK is not None and signals.tail_logp_N is not None
    ids_NK = signals.topk_ids_NK.array.astype(np.int64)
    logits_NK = signals.topk_logits_NK.as_float32()
    lse_N, label_N, tail_N = signals.lse_N.array, signals.label_logp_N.array, signals.tail_logp_N.array
    top_N = ids_NK.max(-1)
    report.refuse(top_N >= spec.vocab_rows, "topk_ids", "an id outside the vocabulary", top_N, spec.vocab_rows - 1)
    report.refuse(~np.isfinite(logits_NK).all(-1), "topk_logits", "holds NaN or infinity", lse_N)
    rising_N = (np.diff(logits_NK, axis=-1) > 0).any(-1)
    report.refuse(rising_N, "topk_logits", "not in falling order", logits_NK[:, 0])
    repeated_N = (np.diff(np.sort(ids_NK, axis=-1), axis=-1) == 0).any(-1)
    report.refuse(repeated_N, "topk_ids", "the same id twice", ids_NK[:, 0])
    report.refuse(np.isnan(tail_N) | (tail_N > 1e-4), "tail_logp", "not a log-probability", tail_N)
    mass_N = np.exp(logits_NK.astype(np.float64) - lse_N[:, None]).sum(-1) + np.exp(tail_N.astype(np.float64))
    report.refuse(np.abs(mass_N - 1) > MASS_TOLERANCE, "tail_logp", "kept and tail mass do not sum to 1", mass_N, "1")
    if batch.extra_ids_NM is not None:
        named_NM = (ids_NK[:, :, None] == batch.extra_ids_NM[:, None, :]).any(1)
        report.refuse(~named_NM.all(-1), "topk_ids", "an id that the student named is missing", ids_NK[:, 0])
    labels_N = batch.labels_N()
    place_NK = ids_NK == labels_N[:, None]
    kept_N = place_NK.any(-1)
    from_kept_N = np.where(place_NK, logits_NK - lse_N[:, None], -np.inf).max(-1)
    difference_N = np.abs(np.where(kept_N, from_kept_N - label_N, 0))
    report.refuse(
        difference_N > LOGP_TOLERANCE,
        "label_logp",
        "differs from the kept entry of the next token: shifted or foreign rows",
        difference_N,
        LOGP_TOLERANCE,
    )
    # A next token outside the kept ids cannot be likelier than the last of them.
    # (with ids named by the student among them: than the k-th).
    above_N = ~kept_N & (label_N > logits_NK[:, spec.k - 1] - lse_N + LOGP_TOLERANCE)
    report.refuse(
        above_N,
        "label_logp",
        "the next token is likelier than the last kept one and yet not kept: shifted or foreign rows",
        label_N,
    )


def _check_full(signals: TeacherSignals, batch: TokenBatch, report: _Reporter) -> None:
    assert signals.logits_NV is not None
    logits_NV = signals.logits_NV.as_float32()
    lse_N, label_N = signals.lse_N.array, signals.label_logp_N.array
    report.refuse(np.isnan(logits_NV).any(-1) | (logits_NV == np.inf).any(-1), "logits", "holds NaN or infinity", lse_N)
    top_N = logits_NV.max(-1)
    own_N = top_N + np.log(np.exp(logits_NV - top_N[:, None]).sum(-1))
    difference_N = np.abs(own_N - lse_N)
    absolute, relative = LSE_TOLERANCE
    report.refuse(
        difference_N > absolute + relative * np.abs(lse_N),
        "lse",
        "differs from the logits' own",
        difference_N,
        absolute,
    )
    own_label_N = logits_NV[np.arange(batch.rows), batch.labels_N()] - own_N
    difference_N = np.abs(own_label_N - label_N)
    report.refuse(
        difference_N > LOGP_TOLERANCE,
        "label_logp",
        "differs from the logits at the next token: shifted or foreign rows",
        difference_N,
        LOGP_TOLERANCE,
    )
