"""Figures for evaluation: how likely the data is, and how far from the teacher, over chunks of rows.

In: as for `output.output_loss`. Out: sums over rows, on the device.
Must never build a graph, weigh rows, or soften anything: all figures are at temperature 1, in nats. Whoever uses figures that
rest on a teacher checks its rows first (`Measures.integrity`), as training does.

Axes: N rows, C rows of a chunk, V vocabulary rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.errors import DataError
from student_trainer.losses.divergence import Divergence, divergence_and_grad
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import Integrity
from student_trainer.losses.rows import GivenRows, Seen, TeacherRows, TopKRows, check_vocabulary, seen_in_logits


@dataclass(frozen=True, eq=False)
class Measures:
    """Figures of N rows.

    Attributes:
        nll_N: -log q(label) of every row; its sum is the file's nats, its mean the log of the perplexity.
        kl_sum: sum of KL(teacher | student), exact; None without a teacher or with top-k rows, which only bound it, or given ones.
        acc1_hits, acc3_hits: rows whose label is the student's first, or among its first three.
        teacher_nll_sum: what the teacher scores on the same rows, or None.
        teacher_acc1_hits, teacher_acc3_hits: its hits, as the student's; None as for `kl_sum`.
        rows: N.
        integrity: evidence that the teacher's rows are of these tokens and its head; None without a teacher, or with given rows.
    """

    nll_N: Tensor
    kl_sum: Tensor | None
    acc1_hits: Tensor
    acc3_hits: Tensor
    teacher_nll_sum: Tensor | None
    teacher_acc1_hits: Tensor | None
    teacher_acc3_hits: Tensor | None
    rows: int
    integrity: Integrity | None = None

    @property
    def nll_sum(self) -> Tensor:
        return self.nll_N.sum()


@torch.no_grad()
def measure(
    student_hidden_ND: Tensor,
    head: Head,
    rows: TeacherRows | None,
    label_ids_N: Tensor,
    chunk_rows: int = 256,
) -> Measures:
    """Figures of N rows against their labels and, if given, the teacher.

    Args:
        student_hidden_ND: states after the final norm.
        head: the student's, sliced to the V of the labels.
        rows: the teacher's, in the same order, or None.
        label_ids_N: int64; every row counts.
        chunk_rows: rows projected at a time.
    Raises:
        DataError: a vocabulary or a number of rows that does not fit.
    """
    exact = rows is not None and not isinstance(rows, TopKRows | GivenRows)
    if rows is not None:
        check_vocabulary(rows, head)
    count = student_hidden_ND.shape[0]
    if label_ids_N.numel() != count or (rows is not None and rows.lse_N.numel() != count):
        raise DataError(f"labels and teacher rows must number {count}, as the student's states do")
    sums_5 = torch.zeros(5, dtype=torch.float64, device=student_hidden_ND.device)
    nll: list[Tensor] = [sums_5[:0]]
    seen: list[Seen] = []
    for index_C in torch.arange(count, device=student_hidden_ND.device).split(chunk_rows) if count else ():
        z_CV = head.logits(student_hidden_ND[index_C])
        log_q_CV = z_CV.log_softmax(-1)
        label_C1 = label_ids_N[index_C][:, None]
        nll.append(-log_q_CV.gather(-1, label_C1)[:, 0].double())
        figures = [*_hits(z_CV, label_C1), *sums_5.new_zeros(3)]
        if rows is not None and not isinstance(rows, TopKRows | GivenRows):
            teacher_CV = rows.take(index_C).logits(z_CV.dtype)
            seen.append(seen_in_logits(teacher_CV, label_C1[:, 0]))
            log_p_CV = teacher_CV.log_softmax(-1)
            kl_C, _ = divergence_and_grad(log_p_CV, log_q_CV, Divergence("forward_kl"))
            figures[2:] = [kl_C.double().sum(), *_hits(log_p_CV, label_C1)]
        sums_5 = sums_5 + torch.stack(figures)
    acc1, acc3, kl, teacher_acc1, teacher_acc3 = sums_5
    return Measures(
        nll_N=torch.cat(nll),
        kl_sum=kl if exact else None,
        acc1_hits=acc1,
        acc3_hits=acc3,
        teacher_nll_sum=None if rows is None else -rows.label_logp_N.double().sum(),
        teacher_acc1_hits=teacher_acc1 if exact else None,
        teacher_acc3_hits=teacher_acc3 if exact else None,
        rows=count,
        integrity=None if rows is None or isinstance(rows, GivenRows) else _evidence(rows, label_ids_N, seen),
    )


def _evidence(rows: TeacherRows, label_ids_N: Tensor, seen: list[Seen]) -> Integrity:
    """What `Integrity.check` will look at, of every row."""
    if isinstance(rows, TopKRows):
        lse_N, label_logp_N = rows.seen(label_ids_N)
    else:
        empty = rows.lse_N[:0]
        lse_N, label_logp_N = (
            torch.cat(column) for column in (zip(*seen, strict=True) if seen else ([empty], [empty]))
        )
    row_N = torch.arange(rows.lse_N.numel(), device=rows.lse_N.device)
    return Integrity(row_N, rows.lse_N, lse_N, rows.label_logp_N, label_logp_N, rows.tolerance)


def _hits(z_CV: Tensor, label_C1: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose label is first, and among the first three."""
    hits_C3 = z_CV.topk(min(3, z_CV.shape[-1]), -1).indices == label_C1
    return hits_C3[:, 0].sum().double(), hits_C3.sum().double()
