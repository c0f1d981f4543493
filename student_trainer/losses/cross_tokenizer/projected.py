"""The divergence between two models with different vocabularies, over the classes that the ids of both fall into (docs/concepts/method.md 8.4).

In: logits of the student and the teacher's row of the same place in the text. Out: loss a row, exact gradient on the student's logits.
With a class for each pair of equal ids it is the divergence over ids itself.

Axes: C rows of a chunk, V ids of the student, K classes, k kept ids of a truncated teacher.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from student_trainer.losses.cross_tokenizer.bridge import VocabularyClasses
from student_trainer.losses.divergence import Divergence, divergence_and_grad
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import FullRows, TopKRows

_HALF = math.log(0.5)


class Projected(NamedTuple):
    """Of a chunk.

    Attributes:
        loss_C: s(tau) D over classes, 0 in rows that are not safe.
        grad_CV: its gradient on the student's logits, times the coefficient of the row; likewise.
        safe_C: bool, rows of which the teacher has at most half its mass in one giant class; None: all.
    """

    loss_C: Tensor
    grad_CV: Tensor
    safe_C: Tensor | None


def projected_terms(
    z_CV: Tensor,
    log_q_CV: Tensor,
    rows: FullRows | TopKRows,
    classes: VocabularyClasses,
    coefficient_C: Tensor,
    spec: OutputLossSpec,
) -> Projected:
    """The divergence over classes and its gradient.

    Args:
        z_CV: of the student, left as they are.
        log_q_CV: its log-probabilities, likewise.
        rows: the teacher's, over its own ids.
        classes: of both vocabularies.
        coefficient_C: every factor of a row's loss, but s(tau).
        spec: what is computed; of top-k rows at temperature 1.
    """
    tau = spec.temperature
    scale = tau**2 if spec.tau_squared else 1.0
    is_plain = tau == 1 or isinstance(rows, TopKRows)
    soft_CV = log_q_CV if is_plain else (z_CV / tau).log_softmax(-1)
    class_CK = classes.of_student.project(soft_CV)
    factor_C = coefficient_C * (scale / tau)
    safe_C: Tensor | None = None
    if isinstance(rows, TopKRows):
        topk_logp_Ck, tail_logp_C = rows.bucket(z_CV.dtype)
        kept = KeptClasses.of(classes.teacher_Vt[rows.topk_ids_NK], topk_logp_Ck)
        safe_C = safe_among_kept(kept, classes)
        loss_C, grad_CK = class_bucket_and_grad(kept, tail_logp_C, class_CK, spec.divergence)
    else:
        log_p_CK = classes.of_teacher.project(rows.logits_NV if tau == 1 else rows.logits_NV / tau).log_softmax(-1)
        safe_C = safe_among_all(log_p_CK, None, classes)
        loss_C, grad_CK = divergence_and_grad(log_p_CK, class_CK, spec.divergence)
    grad_CK.mul_((factor_C if safe_C is None else factor_C * safe_C)[:, None])
    grad_CV = classes.of_student.spread(grad_CK, soft_CV, class_CK)
    loss_C = loss_C * scale
    return Projected(loss_C if safe_C is None else loss_C.masked_fill(~safe_C, 0), grad_CV, safe_C)


def safe_among_all(class_CK: Tensor, lse_C: Tensor | None, classes: VocabularyClasses) -> Tensor | None:
    """bool [C], rows of which the teacher has at most half its mass in one giant class; None: there is no such class.

    Args:
        class_CK: its logits over classes.
        lse_C: their log-sum-exp; None: they are log-probabilities.
    """
    if classes.giants is None:
        return None
    most_C = class_CK.index_select(-1, classes.giants).amax(-1)
    return (most_C if lse_C is None else most_C - lse_C) <= _HALF


def safe_among_kept(kept: KeptClasses, classes: VocabularyClasses) -> Tensor | None:
    """Likewise, of a truncated teacher."""
    if classes.giants is None:
        return None
    is_giant_Ck = classes.is_giant_K[kept.class_Ck]
    return ~(is_giant_Ck & kept.is_last_Ck & (kept.logp_Ck > _HALF)).any(-1)


class KeptClasses(NamedTuple):
    """The classes of a truncated teacher's kept ids; of those that are named several times the last has the mass of all.

    Attributes:
        class_Ck: int64, rising.
        logp_Ck: of each class; of less than it before its last place.
        is_last_Ck: bool.
    """

    class_Ck: Tensor
    logp_Ck: Tensor
    is_last_Ck: Tensor

    @classmethod
    def of(cls, class_Ck: Tensor, topk_logp_Ck: Tensor) -> KeptClasses:
        """From the class of each kept id and the teacher's log-probabilities of the ids."""
        class_Ck, order_Ck = class_Ck.sort(dim=-1, stable=True)
        is_last_Ck = torch.ones_like(class_Ck, dtype=torch.bool)
        is_last_Ck[:, :-1] = class_Ck[:, 1:] != class_Ck[:, :-1]
        return cls(class_Ck, _sums_of_equal(class_Ck, topk_logp_Ck.gather(-1, order_Ck)), is_last_Ck)


def class_bucket_and_grad(
    kept: KeptClasses, tail_logp_C: Tensor, class_q_CK: Tensor, spec: Divergence
) -> tuple[Tensor, Tensor]:
    """`truncated.bucket_and_grad` over classes.

    What of a class the teacher has not kept is in its tail, while the student's class is whole: the two are not the same event, so this is
    no lower bound, and not 0 at the teacher. A class is pulled down by the tail's mass at most; one of one id not at all.

    Args:
        kept: the teacher's classes; with the tail their probabilities sum to 1.
        tail_logp_C: log of the mass of all ids that are not kept.
        class_q_CK: the student's log-probabilities over classes.
    Returns:
        loss_C in nats; grad_CK with respect to class logits.
    """
    class_Ck, log_p_Ck, is_last_Ck = kept
    log_q_Ck = class_q_CK.gather(-1, class_Ck)
    rest_CK = class_q_CK.scatter(-1, class_Ck, -torch.inf)  # a sum over the rest, as in `truncated`
    log_q_tail_C = rest_CK.logsumexp(-1)
    # An outcome of probability 0 on both sides counts for nothing: so a class that is named again.
    loss_C, grad_Ck1 = divergence_and_grad(
        torch.cat([log_p_Ck.masked_fill(~is_last_Ck, -torch.inf), tail_logp_C[:, None]], -1),
        torch.cat([log_q_Ck.masked_fill(~is_last_Ck, -torch.inf), log_q_tail_C[:, None]], -1),
        spec,
    )
    empty_C = torch.isneginf(log_q_tail_C)
    share_CK = rest_CK.sub_(log_q_tail_C.masked_fill(empty_C, 0)[:, None]).exp_()
    tail_C1 = grad_Ck1[:, -1:].masked_fill(empty_C[:, None], 0)
    kept_Ck = grad_Ck1[:, :-1].masked_fill(~is_last_Ck, 0)
    return loss_C, share_CK.mul_(tail_C1).scatter_add_(-1, class_Ck, kept_Ck)  # one of equal classes is not 0


def _sums_of_equal(class_Ck: Tensor, logp_Ck: Tensor) -> Tensor:
    """Of each place the log of the summed probabilities of its class up to there; classes rise. A scan: no scatter, so no order of sums."""
    step = 1
    while step < class_Ck.shape[-1]:
        same_C = class_Ck[:, step:] == class_Ck[:, :-step]
        before_C = logp_Ck[:, :-step].masked_fill(~same_C, -torch.inf)
        logp_Ck = torch.cat([logp_Ck[:, :step], torch.logaddexp(logp_Ck[:, step:], before_C)], -1)
        step *= 2
    return logp_Ck
