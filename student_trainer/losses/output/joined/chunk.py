"""One chunk of rows with the parts of several teachers: figures per row, and the gradient on the student's logits.

In: logits [C, V], what each teacher says of some of the rows, labels and weights. Out: as `chunks.py`, by teacher.
Must never touch a head or a parameter: `loss.py` runs over chunks and pulls the gradients back.

Axes: C rows of a chunk, P of them that a teacher has a distribution of, V ids of the student.
Source: docs/concepts/method.md 3.2, 9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from student_trainer.losses import fused
from student_trainer.losses.cross_tokenizer.bridge import VocabularyClasses
from student_trainer.losses.cross_tokenizer.fused_projected import ClassGradient, fused_projected_terms
from student_trainer.losses.cross_tokenizer.projected import projected_terms
from student_trainer.losses.output.chunks import fused_terms, kd_terms, on_samples
from student_trainer.losses.output.joined import kernels
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import FullRows, TeacherRows, TopKRows


@dataclass(frozen=True, eq=False)
class Piece:
    """A teacher's distributions in a chunk.

    Attributes:
        where: which of the C rows they are of.
        rows: the teacher's, without states; over its own ids.
        coefficient_P: kd_weight times weight times share over the normalizer.
        classes: of both vocabularies; None if the ids are the student's.
        lse_P: log-sum-exp of its logits at temperature 1, if that is known.
        place_C: int64, of each of the C rows its number among the P, -1 for none; needed with classes, unless they are the same.
    """

    where: slice | Tensor
    rows: TeacherRows
    coefficient_P: Tensor
    classes: VocabularyClasses | None = None
    lse_P: Tensor | None = None
    place_C: Tensor | None = None


class PieceFigures(NamedTuple):
    """Loss of each row without any factor; rows that a policy gradient has clipped; rows that are compared over classes, None for all."""

    kd_P: Tensor
    clipped_P: Tensor | None
    safe_P: Tensor | None = None


class OwnFigures(NamedTuple):
    """What the student says of the labels: log-probability, and ids before them."""

    label_logp_C: Tensor
    ahead_C: Tensor


class Chunk:
    """See module. Made once for each chunk; then every piece is added, and `finish` gives the gradient.

    Args:
        z_CV: logits of the student; left as they are.
        label_ids_C: int64.
        sampled_logp_C: as in `chunk_terms`.
        spec: what is computed, with `kd_weight` 1 and `sft_weight` 0: both are in what is added.
        is_fused: with kernels in place of passes over [C, V].
        grad_dtype: that the gradient is rounded to before it is multiplied; used with kernels.
    """

    def __init__(
        self,
        z_CV: Tensor,
        label_ids_C: Tensor,
        sampled_logp_C: Tensor | None,
        spec: OutputLossSpec,
        is_fused: bool,
        grad_dtype: torch.dtype,
    ) -> None:
        self._z_CV, self._labels_C, self._sampled_C = z_CV, label_ids_C, sampled_logp_C
        self._spec, self.is_fused, self._grad_dtype = spec, is_fused, grad_dtype
        self._grad_CV: Tensor | None = None
        self._spread: tuple[ClassGradient, Tensor | None] | None = (
            None  # what is not yet in it, and the row of each of the C
        )
        if is_fused:
            self._lse_C, label_logp_C, ahead_C = fused.label_figures(z_CV, label_ids_C)
            self.own = OwnFigures(label_logp_C, ahead_C)
            return
        label_C1 = label_ids_C[:, None]
        label_z_C1 = z_CV.gather(-1, label_C1)
        self._log_q_CV = z_CV.log_softmax(-1)
        ids_V = torch.arange(z_CV.shape[-1], device=z_CV.device)
        ahead_C = ((z_CV > label_z_C1) | ((z_CV == label_z_C1) & (ids_V < label_C1))).sum(-1)
        self.own = OwnFigures(self._log_q_CV.gather(-1, label_C1)[:, 0], ahead_C)

    def add(self, piece: Piece) -> PieceFigures:
        """A teacher's distributions, by the divergence or the policy gradient; over classes if its ids are others."""
        if self.is_fused and piece.classes is not None and self._spec.policy_gradient is None:
            return self._add_projected(piece, piece.classes)
        z_PV, labels_P, sampled_P = self._of(self._z_CV, piece), self._of(self._labels_C, piece), self._sampled_C
        sampled_P = None if sampled_P is None else self._of(sampled_P, piece)
        if self._spec.policy_gradient is not None:
            found, _ = on_samples(
                self._of(self.own.label_logp_C, piece), sampled_P, piece.rows, labels_P, z_PV.dtype,
                self._spec.policy_gradient,
            )  # fmt: skip
            slope_P1 = (found.slope_C * piece.coefficient_P)[:, None]
            grad_PV = self._probabilities(piece).mul_(-slope_P1).scatter_add_(-1, labels_P[:, None], slope_P1)
            self._add(grad_PV, piece)
            return PieceFigures(found.loss_C, found.clipped_C)
        if piece.classes is not None:
            assert isinstance(piece.rows, FullRows | TopKRows), "states are opened, and given rows refused"
            log_q_PV = self._of(self._log_q_CV, piece)
            projected = projected_terms(z_PV, log_q_PV, piece.rows, piece.classes, piece.coefficient_P, self._spec)
            self._add(projected.grad_CV, piece)
            return PieceFigures(projected.loss_C, None, projected.safe_C)
        if self.is_fused and isinstance(piece.rows, FullRows):
            return self._add_full(piece, piece.rows, z_PV, labels_P)
        if self.is_fused:
            row, grad_PV = fused_terms(z_PV, piece.rows, labels_P, piece.coefficient_P, self._spec, z_PV.dtype)
            self._add(grad_PV, piece)
            return PieceFigures(row.kd_C, None)
        kd_P, grad_PV, _ = kd_terms(z_PV, self._of(self._log_q_CV, piece), piece.rows, labels_P, self._spec)
        self._add(grad_PV.mul_(piece.coefficient_P[:, None]), piece)
        return PieceFigures(kd_P, None)

    def finish(self, scale_C: Tensor | None) -> Tensor:
        """The gradient on the logits with every factor; nothing else may be asked afterwards.

        Args:
            scale_C: slope of the loss in -log q(label), such as the weight of the cross-entropy; None: it is 0 in every row.
        """
        if self.is_fused and not (scale_C is None and self._spread is None):
            return self._written(scale_C, self._grad_dtype)
        if scale_C is None:
            return torch.zeros_like(self._z_CV) if self._grad_CV is None else self._grad_CV
        scale_C1 = scale_C[:, None]
        grad_CV = self._log_q_CV.exp_().mul_(scale_C1).scatter_add_(-1, self._labels_C[:, None], -scale_C1)
        return grad_CV if self._grad_CV is None else self._grad_CV.add_(grad_CV)

    def _written(self, scale_C: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The gradient so far, with that of the labels, in one pass."""
        spread, place_C = (None, None) if self._spread is None else self._spread
        return kernels.gradient(self._z_CV, self._lse_C, scale_C, self._labels_C, self._grad_CV, spread, place_C, dtype)

    def _add_projected(self, piece: Piece, classes: VocabularyClasses) -> PieceFigures:
        """A teacher of another tokenizer, with kernels; what gives each id its share waits for the pass that writes the gradient."""
        assert isinstance(piece.rows, FullRows | TopKRows), "states are opened, and given rows refused"
        if self._spread is not None:
            self._grad_CV, self._spread = self._written(None, self._z_CV.dtype), None
        row_P = None
        if isinstance(piece.where, Tensor):
            assert piece.place_C is not None, "some rows of the chunk have none"
            row_P = piece.where
        found = fused_projected_terms(
            *(self._z_CV, row_P, self._of(self._lse_C, piece), piece.rows, piece.lse_P, classes),
            *(piece.coefficient_P, self._spec),
        )
        self._spread = found.gradient, piece.place_C
        return PieceFigures(found.loss_P, None, found.safe_P)

    def _add_full(self, piece: Piece, rows: FullRows, z_PV: Tensor, labels_P: Tensor) -> PieceFigures:
        """A teacher of the student's tokenizer, with kernels; log-sum-exps that are known are not summed again."""
        tau, lse_P, teacher_lse_P = self._spec.temperature, self._of(self._lse_C, piece), piece.lse_P
        tempered_P = lse_P
        if teacher_lse_P is None or tau != 1:
            teacher_lse_P = fused.row_figures(rows.logits_NV, labels_P, lse_P, tau)[0]
        if tau != 1:
            tempered_P = fused.row_figures(z_PV, labels_P, lse_P, tau)[0]
        scale = tau**2 if self._spec.tau_squared else 1.0
        kd_scale_P = piece.coefficient_P if scale == tau else piece.coefficient_P * (scale / tau)
        loss_P, grad_PV = fused.divergence_grad(
            *(rows.logits_NV, teacher_lse_P, z_PV, tempered_P, kd_scale_P, self._spec.divergence, tau),
            *(lse_P, labels_P, None, z_PV.dtype),
        )
        self._add(grad_PV, piece)
        return PieceFigures(loss_P if scale == 1 else loss_P * scale, None)

    def _probabilities(self, piece: Piece) -> Tensor:
        """[P, V], of the student; a buffer of its own."""
        if self.is_fused:
            return (self._of(self._z_CV, piece) - self._of(self._lse_C, piece)[:, None]).exp_()
        return self._of(self._log_q_CV, piece).exp()

    @staticmethod
    def _of(there_C: Tensor, piece: Piece) -> Tensor:
        return there_C[piece.where]

    def _add(self, grad_PV: Tensor, piece: Piece) -> None:
        """A part of the gradient that is not needed elsewhere."""
        if self._grad_CV is None:
            if grad_PV.shape == self._z_CV.shape:
                self._grad_CV = grad_PV
                return
            self._grad_CV = torch.zeros_like(self._z_CV)
        if isinstance(piece.where, slice):
            self._grad_CV[piece.where].add_(grad_PV)
        else:
            self._grad_CV.index_add_(0, piece.where, grad_PV)  # no row comes twice
