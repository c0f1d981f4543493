"""What `projected.py` computes, with kernels: passes over [P, K] in place of [C, V], and no gradient on ids before it is written once.

In: float32 logits of the student and the teacher's rows on a CUDA device. Out: loss a row, and a gradient on class logits with what it takes to
give each id its share (`joined/kernels.py` does so, in the pass that writes the gradient on the logits).
`projected.py` is the oracle, and what runs wherever `fused.usable` says no.

Axes: C rows of a chunk, P of them that the teacher has a distribution of, V ids of the student, K classes, k kept ids of a truncated teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from student_trainer.losses import fused
from student_trainer.losses.cross_tokenizer import kernels
from student_trainer.losses.cross_tokenizer.bridge import VocabularyClasses
from student_trainer.losses.cross_tokenizer.projected import KeptClasses, safe_among_kept
from student_trainer.losses.divergence import divergence_and_grad
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import FullRows, TopKRows


class ClassGradient(NamedTuple):
    """A gradient on class logits, not yet on ids.

    Attributes:
        grad_PK: with every factor in it.
        class_PK: the class logits, of the student's logits times `scale`.
        coded_V: as of `SortedIds`.
        scale: 1 / temperature.
    """

    grad_PK: Tensor
    class_PK: Tensor
    coded_V: Tensor
    scale: float


class FusedProjected(NamedTuple):
    """As `Projected`."""

    loss_P: Tensor
    gradient: ClassGradient
    safe_P: Tensor | None


def fused_projected_terms(
    z_CV: Tensor,
    row_P: Tensor | None,
    lse_P: Tensor,
    rows: FullRows | TopKRows,
    teacher_lse_P: Tensor | None,
    classes: VocabularyClasses,
    coefficient_P: Tensor,
    spec: OutputLossSpec,
) -> FusedProjected:
    """See `projected_terms`.

    Args:
        row_P: int64, which rows of the student; None for all.
        lse_P: log-sum-exp of their logits at temperature 1; that of their classes is the same.
        teacher_lse_P: likewise of the teacher's; not needed of top-k rows.
    """
    tau = spec.temperature
    scale = tau**2 if spec.tau_squared else 1.0
    side = classes.of_student.sorted_ids
    factor_P = coefficient_P if scale == tau else coefficient_P * (scale / tau)
    class_PK = kernels.sum_classes(z_CV, row_P, side, 1 / tau)
    if isinstance(rows, TopKRows):
        topk_logp_Pk, tail_logp_P = rows.bucket(z_CV.dtype)
        kept = KeptClasses.of(classes.teacher_Vt[rows.topk_ids_NK], topk_logp_Pk)
        safe_P = safe_among_kept(kept, classes)
        factor_P = factor_P if safe_P is None else factor_P * safe_P
        loss_P, grad_PK = _bucket(kept, tail_logp_P, class_PK, lse_P, factor_P, spec)
    else:
        assert teacher_lse_P is not None, "its logits have been looked at"
        teacher_PK = kernels.sum_classes(rows.logits_NV, None, classes.of_teacher.sorted_ids, 1 / tau)
        if tau != 1:
            lse_P, teacher_lse_P = fused.row_lse(class_PK), fused.row_lse(teacher_PK)
        safe_P = None
        if classes.giants is not None:
            safe_P, factor_P = kernels.safe_factor(teacher_PK, teacher_lse_P, classes.giants, factor_P)
        loss_P, grad_PK = fused.divergence_grad(
            *(teacher_PK, teacher_lse_P, class_PK, lse_P, factor_P, spec.divergence, 1.0),
            *(lse_P, None, None, class_PK.dtype),
        )
    loss_P = loss_P if scale == 1 else loss_P * scale
    loss_P = loss_P if safe_P is None else torch.where(safe_P, loss_P, 0.0)
    return FusedProjected(loss_P, ClassGradient(grad_PK, class_PK, side.coded_V, 1 / tau), safe_P)


def _bucket(
    kept: KeptClasses,
    tail_logp_P: Tensor,
    class_PK: Tensor,
    lse_P: Tensor,
    factor_P: Tensor,
    spec: OutputLossSpec,
) -> tuple[Tensor, Tensor]:
    """`class_bucket_and_grad`, the gradient times `factor_P`: outside the kept classes it is a multiple of the student's probabilities."""
    class_Pk, log_p_Pk, is_last_Pk = kept
    z_Pk = class_PK.gather(-1, class_Pk)
    class_PK.scatter_(-1, class_Pk, -torch.inf)
    rest_P = fused.row_lse(class_PK)
    # An outcome of probability 0 on both sides counts for nothing: so a class that is named again.
    loss_P, slope_Pk1 = divergence_and_grad(
        torch.cat([log_p_Pk.masked_fill(~is_last_Pk, -torch.inf), tail_logp_P[:, None]], -1),
        torch.cat([(z_Pk - lse_P[:, None]).masked_fill_(~is_last_Pk, -torch.inf), (rest_P - lse_P)[:, None]], -1),
        spec.divergence,
    )
    empty_P = torch.isneginf(rest_P)
    tail_P = (factor_P * slope_Pk1[:, -1]).masked_fill_(empty_P, 0)
    nothing_P, no_label_P = torch.zeros_like(tail_P), torch.zeros_like(tail_P, dtype=torch.long)
    grad_PK = fused.softmax_grad(
        class_PK, rest_P.masked_fill(empty_P, 0), tail_P, no_label_P, nothing_P, class_PK.dtype
    )
    class_PK.scatter_(-1, class_Pk, z_Pk)
    kept_Pk = (factor_P[:, None] * slope_Pk1[:, :-1]).masked_fill_(~is_last_Pk, 0)
    return loss_P, grad_PK.scatter_add_(-1, class_Pk, kept_Pk)  # one of equal classes is not 0
