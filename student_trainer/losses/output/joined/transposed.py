"""Chunks in which a teacher of another tokenizer is compared, with the logits of an id side by side in memory (`cross_tokenizer/transposed.py`).

In: what of each teacher is read, states of each chunk of the student's. Out: as `chunk.py` and `adding.py`, which are for everything that `serves` refuses.
A chunk of C rows has W columns, C filled up; a teacher's rows of the chunk lie in the columns of those that they are held against, its rows of groups
behind them.

Axes: M kept rows, C of a chunk, W its columns, S the columns of all chunks, T those of a teacher, P rows that it has a distribution of, R rows of it that
are read, V ids, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.cross_tokenizer import kernels, transposed
from student_trainer.losses.cross_tokenizer.bridge import VocabularyClasses
from student_trainer.losses.cross_tokenizer.fused_projected import ClassGradient
from student_trainer.losses.head import Head
from student_trainer.losses.output.joined.adding import add_groups
from student_trainer.losses.output.joined.chunk import OwnFigures
from student_trainer.losses.output.joined.evidence import Read
from student_trainer.losses.output.parts import TeacherPart, on_device_together
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import FullRows, HiddenRows, Seen

COVERED = 0.75  # of the rows: all columns of a chunk are computed for each teacher, whether it describes the row or not


def serves(parts: Sequence[TeacherPart], spec: OutputLossSpec, count: int) -> bool:
    """Whether kernels here know the losses of all these teachers, one has another tokenizer, and each describes most of the M rows (`count`)."""
    return (
        spec.policy_gradient is None
        and any(part.bridge is not None for part in parts)
        and all(isinstance(part.rows, HiddenRows | FullRows) for part in parts)
        and all(_described(part) >= COVERED * count for part in parts)
    )


def _described(part: TeacherPart) -> int:
    """Rows that are compared with a teacher, one by one or in groups."""
    return len(part.place) + (0 if part.groups is None else len(part.groups.student))


class _Pair(NamedTuple):
    """Logits of the student and of a teacher in the columns of a chunk, over their own ids; log-sum-exps at temperature 1; see `Columns.factor`.

    The teacher may have columns beyond those of the student: rows of its groups.
    """

    z_VW: Tensor
    lse_W: Tensor
    teacher_VW: Tensor
    teacher_lse_W: Tensor
    factor_W: Tensor


@dataclass(eq=False)
class Columns:
    """Where the rows of a teacher lie, and what was found of them.

    Attributes:
        read: which rows, in which order.
        start_B1: where the columns of each chunk begin; a chunk without rows of the teacher has none.
        labels_T: of each column; 0 where no row lies.
        row_T: int64, which of the teacher's rows lies in each column; where none does, any.
        column_R: int64, of each row read.
        column_P: of those that are compared row by row.
        place_P: of the same, among the columns of the student in the chunks that have such rows.
        among_P: of the same, among all columns of the student.
        lse, logp, best, loss, safe: of each chunk.
    """

    read: Read
    start_B1: list[int]
    labels_T: Tensor
    row_T: Tensor
    column_R: Tensor
    column_P: Tensor
    place_P: Tensor
    among_P: Tensor
    lse: list[Tensor] = field(default_factory=list)
    logp: list[Tensor] = field(default_factory=list)
    best: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)
    safe: list[Tensor] = field(default_factory=list)

    @staticmethod
    def on_host(read: Read, own_B1: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
        """`start_B1`, and the tensors behind it, from where the student's columns begin."""
        place_B1, start_B1 = np.asarray(read.place_B1), np.asarray(read.start_B1)
        compared_B, read_B, rows_B = np.diff(place_B1), np.diff(start_B1), np.diff(read.bounds)
        width_B = np.where(read_B > 0, transposed.width_of(rows_B + read_B - compared_B), 0)
        column_B1 = np.concatenate([[0], np.cumsum(width_B)])
        own_B = np.where(compared_B > 0, np.diff(own_B1), 0)
        column_P = read.local_P + np.repeat(column_B1[:-1], compared_B)
        number_R = np.arange(start_B1[-1]) - np.repeat(start_B1[:-1], read_B)  # in its chunk
        is_compared_R = number_R < np.repeat(compared_B, read_B)
        column_R = number_R + np.repeat(column_B1[:-1] + rows_B - compared_B, read_B)
        column_R[is_compared_R] = column_P
        labels_T, row_T = np.zeros(column_B1[-1], np.int64), np.zeros(column_B1[-1], np.int64)
        row_T[column_R] = read.order.host_P
        labels_T[column_R] = read.part.host_labels_R[read.order.host_P]
        place_P = read.local_P + np.repeat(np.cumsum(own_B) - own_B, compared_B)
        among_P = read.local_P + np.repeat(own_B1[:-1], compared_B)
        return column_B1.tolist(), [labels_T, row_T, column_R, column_P, place_P, among_P]

    def factor(self, width: int, scale: float) -> Tensor:
        """[S] of the student's columns, what the derivative in each is multiplied by; 0 where the teacher has no row."""
        coefficient_P = self.read.coefficient_P if scale == 1 else self.read.coefficient_P * scale
        return coefficient_P.new_zeros(width).index_copy_(0, self.among_P, coefficient_P)

    def logits(self, number: int) -> Tensor:
        """[V, columns of a chunk]."""
        start, stop = self.start_B1[number : number + 2]
        rows = self.read.part.rows
        if isinstance(rows, HiddenRows):
            return rows.head.logits(rows.hidden_ND[self.row_T[start:stop]], transposed=True).T.float()
        assert isinstance(rows, FullRows), "`serves` refuses others"
        return rows.logits_NV[self.row_T[start:stop]].float().T.contiguous()

    def settle(self) -> None:
        """Gives `read` what was found, row by row."""
        if self.lse:
            lse_T, logp_T, best_T = (torch.cat(there) for there in (self.lse, self.logp, self.best))
            self.read.seen.append(Seen(lse_T[self.column_R], logp_T[self.column_R]))
            self.read.likeliest.append(best_T[self.column_P])
        if self.loss:
            self.read.kd.append(torch.cat(self.loss)[self.place_P])
        if self.safe:
            self.read.safe.append(torch.cat(self.safe)[self.place_P])


class _Gradient:
    """On a chunk's logits, of which the shares of classes are written last."""

    def __init__(self, z_VW: Tensor, lse_W: Tensor, labels_W: Tensor) -> None:
        self._of = z_VW, lse_W
        self._labels_W = labels_W
        self._prior_VW: Tensor | None = None
        self._spread: ClassGradient | None = None

    def add(self, grad_VW: Tensor) -> None:
        self._prior_VW = grad_VW if self._prior_VW is None else self._prior_VW.add_(grad_VW)

    def add_classes(self, grad_KW: Tensor, class_KW: Tensor, coded_V: Tensor, tempered: float) -> None:
        if self._spread is not None:
            self._prior_VW = self.written(None, grad_KW.dtype)
        self._spread = ClassGradient(grad_KW, class_KW, coded_V, tempered)

    def written(self, slope_W: Tensor | None, dtype: torch.dtype) -> Tensor:
        z_VW, lse_W = self._of
        return transposed.gradient(z_VW, lse_W, slope_W, self._labels_W, self._prior_VW, self._spread, dtype)


class TransposedChunks:
    """All chunks of a micro-batch, one after the other; then `settle`.

    Args:
        read: of each teacher.
        bounds: of the chunks among the M kept rows.
        labels_M, own_M: on the host: labels, and weights of the cross-entropy.
    """

    def __init__(
        self,
        read: dict[str, Read],
        bounds: Sequence[int],
        labels_M: np.ndarray,
        own_M: np.ndarray,
        normalizer: float | Tensor,
        spec: OutputLossSpec,
        grad_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        rows_B = np.diff(bounds)
        own_B1 = np.concatenate([[0], np.cumsum(transposed.width_of(rows_B))]).astype(np.int64)
        column_M = np.arange(len(labels_M)) + np.repeat(own_B1[:-1] - np.asarray(bounds)[:-1], rows_B)
        labels_S, own_S = np.zeros(own_B1[-1], np.int64), np.zeros(own_B1[-1], np.float32)
        labels_S[column_M], own_S[column_M] = labels_M, own_M
        placed = [Columns.on_host(of, own_B1) for of in read.values()]
        arrays = [labels_S, own_S, column_M, *(array for _, of_teacher in placed for array in of_teacher)]
        self._labels_S, own, self._column_M, *rest = on_device_together(arrays, device)
        self._columns = []
        for at, (of, (start_B1, _)) in enumerate(zip(read.values(), placed, strict=True)):
            labels_T, row_T, column_R, column_P, place_P, among_P = rest[6 * at : 6 * at + 6]
            self._columns.append(Columns(of, start_B1, labels_T, row_T, column_R, column_P, place_P, among_P))
        tau = spec.temperature
        scale = (tau**2 if spec.tau_squared else 1.0) / tau
        self._factor_S = [columns.factor(int(own_B1[-1]), scale) for columns in self._columns]
        self._slope_S = spec.sft_weight * (own / normalizer)
        self._is_hard = spec.sft_weight > 0 or any(of.part.groups for of in read.values())
        self._start_B1, self._bounds = own_B1.tolist(), bounds
        self._spec, self._grad_dtype = spec, grad_dtype
        self._logp: list[Tensor] = []
        self._ahead: list[Tensor] = []

    def chunk(self, number: int, h_CD: Tensor, head: Head, is_trained: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """As of `RowChunks`; each with the rows that are made up, whose gradient is 0."""
        start, stop = self._start_B1[number : number + 2]
        h_WD = torch.nn.functional.pad(h_CD, (0, 0, 0, stop - start - len(h_CD)))
        z_VW, labels_W = head.logits(h_WD, transposed=True).T, self._labels_S[start:stop]
        slope_W = self._slope_S[start:stop]
        lse_W, logp_W, ahead_W = transposed.label_figures(z_VW, labels_W)
        self._logp.append(logp_W)
        self._ahead.append(ahead_W)
        gradient = _Gradient(z_VW, lse_W, labels_W)
        for columns, factor_S in zip(self._columns, self._factor_S, strict=True):
            self._add(columns, number, z_VW, lse_W, logp_W, factor_S[start:stop], slope_W, gradient)
        if not is_trained:
            return None, z_VW.T, h_WD
        return gradient.written(slope_W if self._is_hard else None, self._grad_dtype).T, z_VW.T, h_WD

    def _add(
        self,
        columns: Columns,
        number: int,
        z_VW: Tensor,
        lse_W: Tensor,
        logp_W: Tensor,
        factor_W: Tensor,
        slope_W: Tensor,
        gradient: _Gradient,
    ) -> None:
        """A teacher's rows of one chunk; its logits are held no longer."""
        (first, last), read = columns.start_B1[number : number + 2], columns.read
        if first == last:
            return
        teacher_VW = columns.logits(number)
        figures = transposed.row_best(teacher_VW, columns.labels_T[first:last])
        for kept, found_W in zip((columns.lse, columns.logp, columns.best), figures, strict=True):
            kept.append(found_W)
        if read.place_B1[number] < read.place_B1[number + 1]:
            self._compare(columns, _Pair(z_VW, lse_W, teacher_VW, figures[0], factor_W), gradient)
        if read.group_B1[number] < read.group_B1[number + 1]:
            begin, end = self._bounds[number : number + 2]
            add_groups(True, logp_W, read, figures[1][end - begin :], number, slope_W, begin)

    def _compare(self, columns: Columns, pair: _Pair, gradient: _Gradient) -> None:
        """A teacher's rows of a chunk with the student's, over classes if its ids are others."""
        tau, bridge = self._spec.temperature, columns.read.part.bridge
        loss_scale = tau**2 if self._spec.tau_squared else 1.0
        if bridge is None:
            z_VW, lse_W, teacher_VW, teacher_lse_W, factor_W = pair
            if tau != 1:
                lse_W, teacher_lse_W = transposed.lse(z_VW, 1 / tau), transposed.lse(teacher_VW, 1 / tau)
            loss_W, grad_VW = transposed.divergence_grad(
                teacher_VW, teacher_lse_W, z_VW, lse_W, factor_W, self._spec.divergence, 1 / tau
            )
            gradient.add(grad_VW)
        else:
            loss_W, safe_W = self._compare_classes(bridge.classes, pair, gradient)
            if safe_W is not None:
                columns.safe.append(safe_W)
                loss_W = torch.where(safe_W, loss_W, 0.0)
        columns.loss.append(loss_W if loss_scale == 1 else loss_W * loss_scale)

    def _compare_classes(
        self, classes: VocabularyClasses, pair: _Pair, gradient: _Gradient
    ) -> tuple[Tensor, Tensor | None]:
        """Loss of each row, and whether it is safe; see `projected_terms`."""
        z_VW, lse_W, teacher_VW, teacher_lse_W, factor_W = pair
        tau, width, side = self._spec.temperature, z_VW.shape[1], classes.of_student.sorted_ids
        class_KW = transposed.sum_classes(z_VW, side, 1 / tau, width)
        teacher_KW = transposed.sum_classes(teacher_VW, classes.of_teacher.sorted_ids, 1 / tau, width)
        if tau != 1:
            lse_W, teacher_lse_W = transposed.lse(class_KW), transposed.lse(teacher_KW)
        safe_W = None
        if classes.giants is not None:
            safe_W, factor_W = kernels.safe_factor(teacher_KW.T, teacher_lse_W, classes.giants, factor_W)
        loss_W, grad_KW = transposed.divergence_grad(
            teacher_KW, teacher_lse_W, class_KW, lse_W, factor_W, self._spec.divergence, 1.0
        )
        gradient.add_classes(grad_KW, class_KW, side.coded_V, 1 / tau)
        return loss_W, safe_W

    def settle(self) -> OwnFigures | None:
        """What was found of all teachers, row by row, for their `Read`; and of the student, None without a row."""
        for columns in self._columns:
            columns.settle()
        if not self._logp:
            return None
        return OwnFigures(torch.cat(self._logp)[self._column_M], torch.cat(self._ahead)[self._column_M])
