"""Figures for evaluation against a teacher with another tokenizer: how far the student is from it over classes of ids.

In: as for `losses.measure`, with a bridge. Out: sums, on the device.
Must never build a graph, weigh rows, or soften anything: all figures are at temperature 1, in nats. Only rows where one token of the
student stands for one of the teacher are compared: longer groups have no distribution in common.

Axes: N rows of the student, M of the teacher, C of a chunk, P of these that are compared, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from student_trainer.errors import DataError
from student_trainer.losses.cross_tokenizer.bridge import Bridge
from student_trainer.losses.divergence import Divergence, divergence_and_grad
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import Integrity
from student_trainer.losses.rows import FullRows, HiddenRows, Seen, TeacherRows, TopKRows, seen_in_logits


@dataclass(frozen=True, eq=False)
class BridgedMeasures:
    """Figures of one micro-batch.

    Attributes:
        kl_sum: sum of KL(teacher | student) over classes; None with top-k rows, which only bound it.
        agreeing: compared rows in which both have their likeliest id in one class; None likewise.
        compared: how many rows are compared.
        teacher_nll_sum: nats of the teacher's own tokens, all of them; the bytes are the student's.
        integrity: evidence of all of its rows; None if there are none.
    """

    kl_sum: Tensor | None
    agreeing: Tensor | None
    compared: int
    teacher_nll_sum: Tensor
    integrity: Integrity | None


@torch.no_grad()
def measure_bridged(
    student_hidden_ND: Tensor, head: Head, rows: TeacherRows, bridge: Bridge, chunk_rows: int = 256
) -> BridgedMeasures:
    """Figures of the rows that both have.

    Args:
        student_hidden_ND: states after the final norm.
        head: the student's, over the ids of the classes.
        rows: the teacher's, of its own tokens.
        bridge: whose groups are among these N and M rows.
        chunk_rows: rows projected at a time.
    Raises:
        DataError: a vocabulary or a number of rows that does not fit; labels that hold no distribution.
    """
    classes, device = bridge.classes, student_hidden_ND.device
    count = rows.lse_N.numel()
    if bridge.labels_M.numel() != count:
        raise DataError(f"{count} teacher rows, and tokens of {bridge.labels_M.numel()}")
    if (classes.of_student.vocab_rows, rows.vocab_rows or classes.of_teacher.vocab_rows) != (
        head.vocab_rows,
        classes.of_teacher.vocab_rows,
    ):
        raise DataError(
            f"classes of {classes.of_student.vocab_rows} ids of the student and {classes.of_teacher.vocab_rows} of the teacher, whose "
            f"heads are over {head.vocab_rows} and {rows.vocab_rows}"
        )
    student_G2, teacher_G2 = bridge.groups.student_G2, bridge.groups.teacher_G2
    one_G = (student_G2[:, 1] - student_G2[:, 0] == 1) & (teacher_G2[:, 1] - teacher_G2[:, 0] == 1)
    student_P, teacher_P = student_G2[one_G, 0], teacher_G2[one_G, 0]
    labels_M = bridge.labels_M.to(device)
    if isinstance(rows, TopKRows):
        seen = rows.seen(labels_M)
        logp_M = rows.label_logp_N
        return BridgedMeasures(None, None, len(student_P), -logp_M.double().sum(), _evidence(rows, seen))
    if not isinstance(rows, HiddenRows | FullRows):
        raise DataError("given labels hold no distribution that a student could be held against")
    sums_2 = torch.zeros(2, dtype=torch.float64, device=device)
    found: list[Seen] = []
    for start in range(0, count, chunk_rows):
        stop = min(start + chunk_rows, count)
        z_CV = rows.take(slice(start, stop)).logits(head.logits(student_hidden_ND[:0]).dtype)
        found.append(seen_in_logits(z_CV, labels_M[start:stop]))
        first, last = np.searchsorted(teacher_P, (start, stop))
        if first == last:
            continue
        of_teacher_P = torch.from_numpy(teacher_P[first:last] - start).to(device)
        of_student_P = torch.from_numpy(student_P[first:last]).to(device)
        log_q_PV = head.logits(student_hidden_ND[of_student_P]).log_softmax(-1)
        log_p_PK = classes.of_teacher.project(z_CV[of_teacher_P]).log_softmax(-1)
        kl_P, _ = divergence_and_grad(log_p_PK, classes.of_student.project(log_q_PV), Divergence("forward_kl"))
        best_P = classes.teacher_Vt[z_CV[of_teacher_P].argmax(-1)]
        same_P = best_P == classes.student_Vs[log_q_PV.argmax(-1)]
        sums_2 = sums_2 + torch.stack([kl_P.double().sum(), same_P.sum().double()])
    empty = rows.lse_N[:0]
    seen = Seen(*(torch.cat(column) for column in zip(*found, strict=True))) if found else Seen(empty, empty)
    return BridgedMeasures(
        sums_2[0], sums_2[1], len(student_P), -seen.label_logp_C.double().sum(), _evidence(rows, seen)
    )


def _evidence(rows: HiddenRows | FullRows | TopKRows, seen: Seen) -> Integrity | None:
    count = rows.lse_N.numel()
    if not count:
        return None
    row_M = torch.arange(count, device=rows.lse_N.device)
    checked = rows.checked if isinstance(rows, HiddenRows) else None
    return Integrity(row_M, rows.lse_N, seen.lse_C, rows.label_logp_N, seen.label_logp_C, rows.tolerance, checked)
