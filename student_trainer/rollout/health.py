"""How far the teacher and the student agree on the student's own sequences, as figures of the log: a term of weight 0.

In: what every term is given; out: nothing to learn, and four means over a few rows of each micro-batch's rollouts. They come from the labels
that are there: exact from states and full logits, over the kept ids and one bucket for the rest from `top_k`. `given` labels tell of the
sampled tokens alone.

Axes: S looked-at rows, V vocabulary rows, K kept ids.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from student_trainer.losses.head import Head
from student_trainer.losses.rows import FullRows, GivenRows, HiddenRows, TopKRows
from student_trainer.losses.term import Mean, Needs, StudentOutputs, SupervisedRows, TeacherLabels, TermResult
from student_trainer.rollout.figures import OF_LABELS

_ROWS = 32  # looked at in each micro-batch, spread evenly
_TOP = 8  # ids whose overlap is told


class HealthTerm:
    """See module.

    Args:
        head: the student's output head as it is now, over the shared ids.
    """

    name = "rollouts"

    def __init__(self, head: Callable[[], Head]) -> None:
        self._head = head

    def needs(self) -> Needs:
        return Needs()

    @torch.no_grad()
    def term(
        self,
        outputs: StudentOutputs,
        labels: TeacherLabels | None,
        rows: SupervisedRows,
        normalizer: float | Tensor,
        step: int,
    ) -> TermResult:
        """`teacher_agreement` (same likeliest id) and `topk_overlap` (of 8) as shares of rows, `teacher_entropy` in nats, and
        `rollout_reverse_kl`, nats per token by the sampled tokens alone; over rows of rollouts.
        """
        device = outputs.final_BLD.device
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        sums = [nothing] * len(OF_LABELS)
        count = nothing
        given = None if labels is None else labels.output
        index_S = self._looked_at(rows)
        if isinstance(given, GivenRows):
            return TermResult(
                torch.zeros((), device=device), {OF_LABELS[-1]: self._of_given(outputs, given, rows, index_S)}
            )
        if index_S is not None and isinstance(given, HiddenRows | FullRows | TopKRows):
            on_device_S = index_S.to(device)
            z_SV = self._head().logits(rows.of(outputs.final_BLD)[on_device_S])
            label_S = rows.labels_N[index_S].to(device)
            sums = [part.double().sum() for part in _compared(z_SV, given.take(on_device_S), label_S)]
            count = torch.full_like(nothing, len(index_S))
        parts = {name: Mean(part, count) for name, part in zip(OF_LABELS, sums, strict=True)}
        return TermResult(torch.zeros((), device=device), parts)

    def _of_given(
        self, outputs: StudentOutputs, given: GivenRows, rows: SupervisedRows, index_S: Tensor | None
    ) -> Mean:
        """By how much likelier than the teacher the student finds its samples: all that the teacher's word on them alone can tell."""
        device = outputs.final_BLD.device
        if index_S is None:
            return Mean(*torch.zeros(2, dtype=torch.float64, device=device))
        on_device_S = index_S.to(device)
        z_SV = self._head().logits(rows.of(outputs.final_BLD)[on_device_S])
        label_S1 = rows.labels_N[index_S].to(device)[:, None]
        log_q_S = z_SV.log_softmax(-1).gather(-1, label_S1)[:, 0]
        apart = (log_q_S.double() - given.label_logp_N[on_device_S].double()).sum()
        return Mean(apart, torch.full_like(apart, len(index_S)))

    def _looked_at(self, rows: SupervisedRows) -> Tensor | None:
        """int64 [S], on the host; None where no row is a rollout's."""
        if rows.sampled_logp_N is None:
            return None
        of_rollouts = (~rows.sampled_logp_N.isnan()).nonzero()[:, 0]
        looked_at = min(_ROWS, len(of_rollouts))
        places = torch.arange(looked_at) * (len(of_rollouts) - 1) // max(1, looked_at - 1)
        return of_rollouts[places]


def _compared(z_SV: Tensor, teacher: HiddenRows | FullRows | TopKRows, label_S: Tensor) -> tuple[Tensor, ...]:
    """Of each row: whether the likeliest id is the same, the share of the likeliest ids that both name, the teacher's entropy, and by how
    much likelier than the teacher the student finds the label.
    """
    log_q_SV = z_SV.log_softmax(-1)
    label_S1 = label_S[:, None]
    if isinstance(teacher, TopKRows):
        log_p_SK, tail_S = teacher.bucket(z_SV.dtype)
        top = min(_TOP, log_p_SK.shape[1])
        best_St = teacher.topk_ids_NK.gather(-1, log_p_SK.topk(top, dim=-1).indices)
        entropy_S = -(log_p_SK.exp() * log_p_SK).sum(-1) - torch.special.xlogy(tail_S.exp(), tail_S.exp())
        label_p_S = torch.where(teacher.topk_ids_NK == label_S1, log_p_SK, -torch.inf).amax(-1)
        # A label outside has the mass of the tail at most.
        label_p_S = torch.where(
            label_p_S.isneginf(), torch.minimum(teacher.label_logp_N.to(z_SV.dtype), tail_S), label_p_S
        )
    else:
        log_p_SV = teacher.logits(z_SV.dtype).log_softmax(-1)
        top = min(_TOP, log_p_SV.shape[1])
        best_St = log_p_SV.topk(top, dim=-1).indices
        entropy_S = -torch.special.xlogy(log_p_SV.exp(), log_p_SV.exp()).sum(-1)
        label_p_S = log_p_SV.gather(-1, label_S1)[:, 0]
    own_St = log_q_SV.topk(top, dim=-1).indices
    shared_S = (own_St[:, :, None] == best_St[:, None, :]).any(-1).double().mean(-1)
    return own_St[:, 0] == best_St[:, 0], shared_S, entropy_S, log_q_SV.gather(-1, label_S1)[:, 0] - label_p_S
