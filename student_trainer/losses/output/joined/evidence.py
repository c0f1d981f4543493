"""What is read of a teacher's rows while a loss runs over chunks of them: figures by row, and the evidence that they are its word.

In: rows of each chunk, opened to logits once; out: an `Integrity` of all that was read.

Axes: P rows of a teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses import fused
from student_trainer.losses.integrity import Integrity
from student_trainer.losses.output.parts import Index, TeacherPart
from student_trainer.losses.rows import FullRows, GivenRows, HiddenRows, Seen, TeacherRows, TopKRows, seen_in_logits


@dataclass(eq=False)
class Read:
    """Of one teacher, an entry for each chunk.

    Attributes:
        kd: losses by row, without any factor.
        clipped: rows that a policy gradient has clipped.
        safe: rows that are compared over classes; nothing where all are.
        likeliest: int64, its likeliest id of each row that it has a distribution of; of a teacher with another tokenizer, an id of
            the student that stands for its class.
        alm: losses of groups that are compared as a whole.
        row: on the host, which of its rows were looked at.
        seen: what its logits say of their labels; nothing from top-k rows, of which it is found without.
    """

    kd: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    safe: list[Tensor] = field(default_factory=list)
    likeliest: list[Tensor] = field(default_factory=list)
    alm: list[Tensor] = field(default_factory=list)
    row: list[np.ndarray] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    def look(
        self, part: TeacherPart, index: Index, first: int, last: int, dtype: torch.dtype
    ) -> tuple[TeacherRows, Tensor]:
        """Opens rows `first` to `last` of `index` and looks at them.

        Returns:
            the rows, and the log-probability of the token that each describes.
        """
        at_P = index.part(first, last)
        rows = opened(part.rows.take(at_P), dtype)
        self.row.append(index.host_P[first:last])
        if not isinstance(rows, FullRows):
            return rows, rows.label_logp_N.to(dtype)
        seen = _seen(rows.logits_NV, part.labels_R[at_P])
        self.seen.append(seen)
        return rows, seen.label_logp_C

    def note_likeliest(self, part: TeacherPart, rows: TeacherRows) -> None:
        """Which id each of some rows finds likeliest; nothing of given rows."""
        if isinstance(rows, FullRows):
            best_P = rows.logits_NV.argmax(-1)
        elif isinstance(rows, TopKRows):
            best_P = rows.topk_ids_NK.gather(-1, rows.topk_logits_NK.argmax(-1, keepdim=True))[:, 0]
        else:
            return
        if part.bridge is not None:
            classes = part.bridge.classes
            best_P = classes.of_student.first_K[classes.teacher_Vt[best_P]]
        self.likeliest.append(best_P)


def _seen(z_PV: Tensor, label_ids_P: Tensor) -> Seen:
    """`seen_in_logits`, by a kernel where there is one."""
    if z_PV.dtype != torch.float32 or not fused.usable(z_PV):
        return seen_in_logits(z_PV, label_ids_P)
    label_z_P = z_PV.gather(-1, label_ids_P[:, None])[:, 0]
    lse_P, _ = fused.row_figures(z_PV, label_ids_P, label_z_P)
    return Seen(lse_P, label_z_P - lse_P)


def opened(rows: TeacherRows, dtype: torch.dtype) -> TeacherRows:
    """With logits in place of states, so that they are computed once however often they are read; of a chunk alone."""
    if not isinstance(rows, HiddenRows | FullRows):
        return rows
    return FullRows(rows.logits(dtype), rows.lse_N, rows.label_logp_N, rows.tolerance)


def evidence_of(part: TeacherPart, read: Read) -> Integrity | None:
    """What `Integrity.check` will look at, of the teacher's rows that were used, numbered as it has sent them; the comparison is under way
    already. None of given rows, or if none was used.
    """
    if isinstance(part.rows, GivenRows) or not read.row:
        return None
    used = Index.of(np.concatenate(read.row), part.labels_R.device)
    row_P = used.part(0, len(used))
    if isinstance(part.rows, TopKRows):
        seen = part.rows.take(row_P).seen(part.labels_R[row_P])
    else:
        seen = Seen(*(torch.cat(column) for column in zip(*read.seen, strict=True)))
    checked = part.rows.checked if isinstance(part.rows, HiddenRows) else None
    if checked is not None and isinstance(part.rows, HiddenRows):
        told = part.rows.checked_row
        # Where it is not told which, of the rows left out some may be among the checked: so many are looked at at least.
        left_out = part.rows.lse_N.numel() - len(used)
        checked = max(1, checked - left_out) if told is None else int(np.isin(used.host_P, told).sum())
    served = part.rows.lse_N[row_P], part.rows.label_logp_N[row_P]
    evidence = Integrity(
        used.device_P, served[0], seen.lse_C, served[1], seen.label_logp_C, part.rows.tolerance, checked, part.name
    )
    evidence.begin()
    return evidence
