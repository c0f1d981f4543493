"""The divergence between two models with different vocabularies, over the classes that the ids of both fall into (algorithms.md 8.4).

In: logits of the student and the teacher's row of the same place in the text. Out: loss a row, exact gradient on the student's logits.
With a class for each pair of equal ids it is the divergence over ids itself.

Axes: C rows of a chunk, V ids of the student, K classes, k kept ids of a truncated teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.losses import fused
from student_trainer.losses.cross_tokenizer.bridge import VocabularyClasses
from student_trainer.losses.divergence import Divergence, divergence_and_grad
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import FullRows, TopKRows


def projected_terms(
    z_CV: Tensor,
    log_q_CV: Tensor | None,
    rows: FullRows | TopKRows,
    classes: VocabularyClasses,
    coefficient_C: Tensor,
    spec: OutputLossSpec,
) -> tuple[Tensor, Tensor]:
    """s(tau) D over classes of each row, and its gradient on the student's logits, times the coefficient of the row.

    Args:
        z_CV: of the student, left as they are.
        log_q_CV: its log-probabilities, likewise; None: with kernels in place of passes over [C, V] and [C, K], of float32 on a GPU.
        rows: the teacher's, over its own ids.
        classes: of both vocabularies.
        coefficient_C: every factor of a row's loss, but s(tau).
        spec: what is computed; of top-k rows at temperature 1.
    """
    is_fused, tau = log_q_CV is None, spec.temperature
    scale = tau**2 if spec.tau_squared else 1.0
    if isinstance(rows, TopKRows):
        soft_CV = z_CV.log_softmax(-1) if log_q_CV is None else log_q_CV
    elif log_q_CV is None:
        soft_CV = z_CV if tau == 1 else z_CV / tau
    else:
        soft_CV = log_q_CV if tau == 1 else (z_CV / tau).log_softmax(-1)
    class_CK = classes.of_student.project(soft_CV, is_fused)
    factor_C = coefficient_C if tau == scale == 1 else coefficient_C * (scale / tau)
    if isinstance(rows, TopKRows):
        kept_Ck = classes.teacher_Vt[rows.topk_ids_NK]
        loss_C, grad_CK = class_bucket_and_grad(kept_Ck, *rows.bucket(z_CV.dtype), class_CK, spec.divergence)
        grad_CK.mul_(factor_C[:, None])
    else:
        teacher_CK = classes.of_teacher.project(rows.logits_NV if tau == 1 else rows.logits_NV / tau, is_fused)
        if is_fused:
            loss_C, grad_CK = _by_kernel(teacher_CK, class_CK, factor_C, spec.divergence)
        else:
            loss_C, grad_CK = divergence_and_grad(teacher_CK.log_softmax(-1), class_CK, spec.divergence)
            grad_CK.mul_(factor_C[:, None])
    grad_CV = classes.of_student.spread(grad_CK, soft_CV, class_CK, is_fused)
    return (loss_C if scale == 1 else loss_C * scale), grad_CV


def _by_kernel(teacher_CK: Tensor, class_CK: Tensor, factor_C: Tensor, spec: Divergence) -> tuple[Tensor, Tensor]:
    """`divergence_and_grad` of two sets of class logits; the gradient times `factor_C`."""
    no_label_C = torch.zeros(len(class_CK), dtype=torch.long, device=class_CK.device)
    teacher_C, student_C = (
        fused.row_figures(there_CK, no_label_C, there_CK[:, 0].contiguous())[0] for there_CK in (teacher_CK, class_CK)
    )
    return fused.divergence_grad(
        *(teacher_CK, teacher_C, class_CK, student_C, factor_C, spec, 1.0),
        *(student_C, no_label_C, None, class_CK.dtype),
    )


def class_bucket_and_grad(
    class_Ck: Tensor, topk_logp_Ck: Tensor, tail_logp_C: Tensor, class_q_CK: Tensor, spec: Divergence
) -> tuple[Tensor, Tensor]:
    """`truncated.bucket_and_grad` over classes, of which the kept ids may name one several times: then their masses are summed.

    What of a class the teacher has not kept is in its tail, and so the loss is a lower bound as with every bucket.

    Args:
        class_Ck: int64, of each kept id.
        topk_logp_Ck, tail_logp_C: the teacher's log-probabilities; with the tail they sum to 1.
        class_q_CK: the student's log-probabilities over classes.
    Returns:
        loss_C in nats; grad_CK with respect to class logits.
    """
    class_Ck, order_Ck = class_Ck.sort(dim=-1, stable=True)
    log_p_Ck = _sums_of_equal(class_Ck, topk_logp_Ck.gather(-1, order_Ck))
    is_last_Ck = torch.ones_like(class_Ck, dtype=torch.bool)
    is_last_Ck[:, :-1] = class_Ck[:, 1:] != class_Ck[:, :-1]
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
