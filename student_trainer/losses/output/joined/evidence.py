"""What is read of a teacher's rows while a loss runs over chunks of them: figures by row, and the evidence that they are its word.

In: rows of each chunk, opened to logits once; out: an `Integrity` of all that was read.

Axes: P rows of a teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses import fused
from student_trainer.losses.integrity import Integrity
from student_trainer.losses.output.parts import Index, TeacherPart
from student_trainer.losses.rows import FullRows, GivenRows, HiddenRows, Seen, TeacherRows, TopKRows, seen_in_logits


class OpenedRows(NamedTuple):
    """Rows of a teacher that have been opened.

    Attributes:
        rows: without states.
        label_logp_P: of the token that each describes.
        lse_P: of their logits; None of rows without.
        likeliest_P: int64, their likeliest ids; None of given rows.
    """

    rows: TeacherRows
    label_logp_P: Tensor
    lse_P: Tensor | None = None
    likeliest_P: Tensor | None = None

    def part(self, where: slice) -> OpenedRows:
        """Some neighbours of them, without a copy."""
        if where == slice(0, len(self.label_logp_P)):
            return self
        lse_P, likeliest_P = (None if there is None else there[where] for there in (self.lse_P, self.likeliest_P))
        return OpenedRows(self.rows.take(where), self.label_logp_P[where], lse_P, likeliest_P)


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

    def look(self, part: TeacherPart, spans: Sequence[tuple[Index, int, int]], dtype: torch.dtype) -> OpenedRows:
        """Opens rows of the teacher and looks at them.

        Args:
            spans: of each index the rows `first` to `last`, one behind another.
        """
        spans = [span for span in spans if span[1] < span[2]]
        if len(spans) == 1:
            ((index, first, last),) = spans
            at_P = index.part(first, last)
        else:
            at_P = torch.cat([index.device_P[first:last] for index, first, last in spans])
        rows = opened(part.rows.take(at_P), dtype)
        self.row += [index.host_P[first:last] for index, first, last in spans]
        if isinstance(rows, TopKRows):
            best_P = rows.topk_ids_NK.gather(-1, rows.topk_logits_NK.argmax(-1, keepdim=True))[:, 0]
            return OpenedRows(rows, rows.label_logp_N.to(dtype), None, best_P)
        if not isinstance(rows, FullRows):
            return OpenedRows(rows, rows.label_logp_N.to(dtype))
        seen, best_P = _seen(rows.logits_NV, part.labels_R[at_P])
        self.seen.append(seen)
        return OpenedRows(rows, seen.label_logp_C, seen.lse_C, best_P)

    def note_likeliest(self, part: TeacherPart, looked: OpenedRows) -> None:
        """Which id each of some rows finds likeliest; nothing of given rows."""
        best_P = looked.likeliest_P
        if best_P is None:
            return
        if part.bridge is not None:
            classes = part.bridge.classes
            best_P = classes.of_student.first_K[classes.teacher_Vt[best_P]]
        self.likeliest.append(best_P)


def _seen(z_PV: Tensor, label_ids_P: Tensor) -> tuple[Seen, Tensor]:
    """`seen_in_logits` and the likeliest ids, by a kernel where there is one."""
    if z_PV.dtype != torch.float32 or not fused.usable(z_PV):
        return seen_in_logits(z_PV, label_ids_P), z_PV.argmax(-1)
    lse_P, best_P = fused.row_best(z_PV)
    return Seen(lse_P, z_PV.gather(-1, label_ids_P[:, None])[:, 0] - lse_P), best_P


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
