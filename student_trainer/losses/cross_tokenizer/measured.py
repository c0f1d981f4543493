"""How far a student is from a teacher with another tokenizer on held-out rows: KL between classes of ids, over rows that are one to one.

In: states of the student, the teacher's rows and a bridge; out: sums, at temperature 1, in nats. It builds no graph and weighs no row.

Axes: N rows of the student, M of the teacher, D width; C rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.cross_tokenizer.bridge import Bridge
from student_trainer.losses.divergence import Divergence, divergence_and_grad
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import Integrity
from student_trainer.losses.rows import GivenRows, Seen, TeacherRows, TopKRows, seen_in_logits


@dataclass(frozen=True, eq=False)
class BridgedMeasures:
    """Figures of the rows that are one to one.

    Attributes:
        kl_sum: [], float64, sum of KL(teacher | student) between classes; None where the teacher's distributions are not whole.
        rows: how many.
        integrity: evidence that these rows of the teacher are of its tokens and its head; None where none was looked at.
    """

    kl_sum: Tensor | None
    rows: int
    integrity: Integrity | None


@torch.no_grad()
def measure_bridged(
    student_hidden_ND: Tensor, head: Head, rows: TeacherRows, bridge: Bridge, *, chunk_rows: int = 256
) -> BridgedMeasures:
    """Figures of a micro-batch.

    Args:
        student_hidden_ND: states after the final norm.
        head: the student's, sliced to the V of the classes.
        rows: the M of the teacher, over its own ids.
        bridge: of the micro-batch.
        chunk_rows: rows projected at a time.
    """
    groups = bridge.groups
    is_one_G = (np.diff(groups.student_G2, axis=1) == 1)[:, 0] & (np.diff(groups.teacher_G2, axis=1) == 1)[:, 0]
    device = student_hidden_ND.device
    ours_n = torch.from_numpy(groups.student_G2[is_one_G, 0]).to(device)
    theirs_n = torch.from_numpy(groups.teacher_G2[is_one_G, 0]).to(device)
    count = ours_n.numel()
    if isinstance(rows, TopKRows | GivenRows) or not count:
        return BridgedMeasures(None, count, None)
    labels_M = bridge.labels_M.to(device)
    kl_sum = torch.zeros((), dtype=torch.float64, device=device)
    seen: list[Seen] = []
    for place_C in torch.arange(count, device=device).split(chunk_rows):
        log_q_CV = head.logits(student_hidden_ND[ours_n[place_C]]).log_softmax(-1)
        teacher_CV = rows.take(theirs_n[place_C]).logits(log_q_CV.dtype)
        seen.append(seen_in_logits(teacher_CV, labels_M[theirs_n[place_C]]))
        classes = bridge.classes
        log_p_CK = classes.of_teacher.project(teacher_CV.log_softmax(-1))
        kl_C, _ = divergence_and_grad(log_p_CK, classes.of_student.project(log_q_CV), Divergence("forward_kl"))
        kl_sum += kl_C.double().sum()
    lse_n, label_logp_n = (torch.cat(column) for column in zip(*seen, strict=True))
    evidence = Integrity(
        theirs_n, rows.lse_N[theirs_n], lse_n, rows.label_logp_N[theirs_n], label_logp_n, rows.tolerance
    )
    return BridgedMeasures(kl_sum, count, evidence)
