"""The refusals: no label row reaches a loss unless it can be what it claims to be.

In: an answer and what was asked; out: nothing, or a LabelError that names the sample and the row. What can be
checked from the answer alone is checked here, for every row; the head-dependent check of `hidden` rows
(lse and label recomputed from the state) happens where the logits are made, in losses.

Almost every answer is right, so each check first looks at all rows at once, and row by row only where that finds something.

Axes: N rows, K kept ids, M ids named by the student, V vocabulary rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from teacher_wire.core.axes import Axis, Entries, axis_of
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import LabelError
from teacher_wire.core.signals import AnswerShape, Signal, SignalSpec, TeacherSignals
from teacher_wire.core.tensor import FLOATS, Tensor
from teacher_wire.score.signals import Attention, Full, Hidden, LayerStates, TopK

# Probabilities that must sum to 1, and figures computed twice: float32 log-sums over bf16 logits (docs/concepts/method.md 3.6).
MASS_TOLERANCE = 1e-3
LSE_TOLERANCE = (0.02, 0.002)  # absolute, relative
LOGP_TOLERANCE = 0.05
_BF16_INFINITY, _BF16_MINUS_INFINITY = 0x7F80, 0xFF80
_FLOAT32_EPSILON = 2.0**-24  # of one rounding


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
    report = Reporter(batch, names, spec.vocab_rows)
    for name, tensor in signals.tensors.items():
        expected = report.entries.total(axis_of(name))
        if tensor.shape[0] != expected:
            raise LabelError("wrong number of rows", field="rows", value=tensor.shape[0], limit=expected)
    of = "N" if spec.check == "all" else "C"
    lse, label = signals[f"lse_{of}"].array, signals[f"label_logp_{of}"].array
    axis = axis_of(f"lse_{of}")
    report.refuse(~np.isfinite(lse), "lse", "not a finite number", lse, axis=axis)
    report.refuse(~np.isfinite(label) | (label > 1e-4), "label_logp", "not a log-probability", label, axis=axis)
    for signal in spec.signals:
        CHECKS.get(signal.kind, _check_finite)(signals, signal, batch, report)


def _not_finite(tensor: Tensor) -> np.ndarray:
    """bool [N]: entries that hold NaN or infinity.

    Of bfloat16 by its bits: from infinity on, read as signed (the positive) or unsigned (the negative); that needs no copy.
    """
    values = tensor.array
    if tensor.dtype != "bfloat16":
        return ~np.isfinite(values).all(tuple(range(1, values.ndim)))
    values = values.reshape(len(values), -1)
    signed = values.view(np.int16)
    if values.max() < _BF16_MINUS_INFINITY and signed.max() < _BF16_INFINITY:
        return np.zeros(values.shape[0], np.bool_)
    found: np.ndarray = (values.max(-1) >= _BF16_MINUS_INFINITY) | (signed.max(-1) >= _BF16_INFINITY)
    return found


class Reporter:
    """Turns a mask of bad rows [N], or of bad entries [N, K], into an error that names the first row.

    Attributes:
        entries: of the batch.
        vocab_rows: V of the request.
    """

    def __init__(self, batch: TokenBatch, names: Sequence[str], vocab_rows: int) -> None:
        self.vocab_rows = vocab_rows
        self.entries = Entries(batch)
        self._batch = batch
        self._names = names

    def names_of(self, signal: Signal) -> set[str]:
        """Of the tensors that answer one signal."""
        return {part.name for part in signal.fields(AnswerShape(self.vocab_rows, 0, "float32"))}

    def refuse(
        self, bad: Any, field: str, complaint: str, value_N: np.ndarray, limit: object = "", axis: Axis = Axis.ROW
    ) -> None:
        """Raises LabelError if anything is bad; `bad` and `value_N` have an entry for each of `axis`."""
        if not bad.any():
            return
        bad_N = bad if bad.ndim == 1 else bad.any(tuple(range(1, bad.ndim)))
        entry = row = int(np.argmax(bad_N))
        if axis is not Axis.ROW:
            row = int(np.searchsorted(self.entries.before(axis), entry, side="right")) - 1
        sequence = self._batch.sequence_of_row(row)
        token = int(self._batch.rows_of()[row] - self._batch.cu_lengths_B1[sequence])
        raise LabelError(
            f"the teacher's labels for {self._names[sequence]}, row {token}: {complaint} ({int(bad_N.sum())} of {bad_N.size} rows)",
            field=field, value=value_N[entry], limit=limit,
        )  # fmt: skip


def _check_finite(signals: TeacherSignals, signal: Signal, batch: TokenBatch, report: Reporter) -> None:
    """What is asked of every kind: that its floats are finite."""
    for name, tensor in signals.tensors.items():
        if tensor.dtype in FLOATS and name in report.names_of(signal):
            bad = _not_finite(tensor)
            report.refuse(bad, name, "holds NaN or infinity", np.where(bad, np.nan, 0.0), axis=axis_of(name))


def _check_hidden(signals: TeacherSignals, signal: Hidden, batch: TokenBatch, report: Reporter) -> None:
    _check_finite(signals, signal, batch, report)
    if "outlier_ids_NO" in signals:
        top_N = signals["outlier_ids_NO"].array.max(-1)
        width = signals["state_int8_ND"].shape[1]
        report.refuse(top_N >= width, "outlier_ids", "a channel outside the state", top_N, width - 1)


def _check_layers(signals: TeacherSignals, signal: LayerStates, batch: TokenBatch, report: Reporter) -> None:
    _check_finite(signals, signal, batch, report)
    for layer in signal.layers if signal.reduction == "int8" else ():
        name = f"layer{layer}_outlier_ids"
        top_N = signals[f"{name}_NO"].array.max(-1)
        width = signals[f"layer{layer}_int8_ND"].shape[1]
        report.refuse(top_N >= width, name, "a channel outside the state", top_N, width - 1)


def _check_attention(signals: TeacherSignals, signal: Attention, batch: TokenBatch, report: Reporter) -> None:
    _check_finite(signals, signal, batch, report)
    for name in sorted(report.names_of(signal)):
        mass_K = signals[name].array
        bad_K = (mass_K < 0) | (mass_K > 1 + MASS_TOLERANCE)
        report.refuse(bad_K, name, "not a probability", mass_K, "0..1", axis=axis_of(name))
        starts_N = report.entries.before(axis_of(name))[:-1]
        sum_N = np.add.reduceat(mass_K.astype(np.float32), starts_N)  # half a unit of float16 a block is rounding
        report.refuse(sum_N > 1 + MASS_TOLERANCE, name, "a row's blocks hold more than all of it", sum_N, 1)


def _check_top_k(signals: TeacherSignals, signal: TopK, batch: TokenBatch, report: Reporter) -> None:
    ids_NK = signals["topk_ids_NK"].array
    lse_N, label_N, tail_N = signals.lse_N.array, signals.label_logp_N.array, signals["tail_logp_N"].array
    if ids_NK.max() >= report.vocab_rows:
        top_N = ids_NK.max(-1)
        report.refuse(
            top_N >= report.vocab_rows, "topk_ids", "an id outside the vocabulary", top_N, report.vocab_rows - 1
        )
    report.refuse(_not_finite(signals["topk_logits_NK"]), "topk_logits", "holds NaN or infinity", lse_N)
    logits_NK = signals["topk_logits_NK"].as_float32()
    report.refuse(_next_to(np.less, logits_NK), "topk_logits", "not in falling order", logits_NK[:, 0])
    sorted_NK = np.sort(ids_NK, axis=-1)  # of 16 or 32 bits, which numpy sorts ten times as fast as 64
    report.refuse(_next_to(np.equal, sorted_NK), "topk_ids", "the same id twice", ids_NK[:, 0])
    report.refuse(np.isnan(tail_N) | (tail_N > 1e-4), "tail_logp", "not a log-probability", tail_N)
    mass_N = _mass(logits_NK, lse_N, tail_N)
    report.refuse(np.abs(mass_N - 1) > MASS_TOLERANCE, "tail_logp", "kept and tail mass do not sum to 1", mass_N, "1")
    if batch.extra_ids_NM is not None:
        missing_NM = np.stack(
            [~(ids_NK == named_N[:, None]).any(-1) for named_N in batch.extra_ids_NM.T.view(np.uint32)], -1
        )
        report.refuse(missing_NM, "topk_ids", "an id that the student named is missing", ids_NK[:, 0])
    # Ids are distinct by now: the next token is at one place of a row at most.
    at = np.flatnonzero(ids_NK == batch.labels_N().view(np.uint32)[:, None])
    rows = at // ids_NK.shape[1]
    kept_N, difference_N = np.zeros(batch.rows, np.bool_), np.zeros(batch.rows, np.float32)
    kept_N[rows] = True
    difference_N[rows] = np.abs(logits_NK.reshape(-1)[at] - lse_N[rows] - label_N[rows])
    report.refuse(
        difference_N > LOGP_TOLERANCE,
        "label_logp",
        "differs from the kept entry of the next token: shifted or foreign rows",
        difference_N,
        LOGP_TOLERANCE,
    )
    # A next token outside the kept ids cannot be likelier than the last of them.
    # (with ids named by the student among them: than the k-th).
    above_N = ~kept_N & (label_N > logits_NK[:, signal.k - 1] - lse_N + LOGP_TOLERANCE)
    report.refuse(
        above_N,
        "label_logp",
        "the next token is likelier than the last kept one and yet not kept: shifted or foreign rows",
        label_N,
    )


def _next_to(relation: np.ufunc, values_NK: np.ndarray) -> np.ndarray:
    """bool [N, K]: where `relation` holds between an entry and the next one of its row; never for the last."""
    values = np.ascontiguousarray(values_NK).reshape(-1)  # in one piece: rows of K are short for numpy
    holds_NK = np.empty(values_NK.shape, np.bool_)
    relation(values[:-1], values[1:], out=holds_NK.reshape(-1)[:-1])
    holds_NK[:, -1] = False
    return holds_NK


def _mass(logits_NK: np.ndarray, lse_N: np.ndarray, tail_N: np.ndarray) -> np.ndarray:
    """float64 [N]: kept and tail mass, to float64 wherever float32 leaves open whether it is 1 within MASS_TOLERANCE."""
    with np.errstate(over="ignore"):
        mass_N = np.einsum("nk->n", np.exp(logits_NK - lse_N[:, None])) + np.exp(tail_N)
    mass_N = mass_N.astype(np.float64)
    # Relative to the mass, float32 is off by a rounding an addend and some of the exponential; twice that is left.
    error = (logits_NK.shape[1] + 16) * 2 * _FLOAT32_EPSILON
    open_N = ~(np.abs(mass_N - 1) < MASS_TOLERANCE - error)
    if open_N.any():
        kept_NK = np.exp(logits_NK[open_N].astype(np.float64) - lse_N[open_N, None])
        mass_N[open_N] = kept_NK.sum(-1) + np.exp(tail_N[open_N].astype(np.float64))
    return mass_N


def _check_full(signals: TeacherSignals, signal: Full, batch: TokenBatch, report: Reporter) -> None:
    logits_NV = signals["logits_NV"].as_float32()
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


# What is checked of each kind of signal; of a kind that is not here, that its numbers are finite.
CHECKS: dict[str, Callable[[TeacherSignals, Any, TokenBatch, Reporter], None]] = {
    TopK.kind: _check_top_k,
    Hidden.kind: _check_hidden,
    Full.kind: _check_full,
    LayerStates.kind: _check_layers,
    Attention.kind: _check_attention,
}
