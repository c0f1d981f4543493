"""What is read of a teacher's rows while a loss runs over chunks of them: figures by row, and the evidence that they are its word.

In: rows of each chunk, opened to logits once; out: an `Integrity` of all that was read.

Axes: M kept rows, P of them that a teacher has a distribution of, V ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from student_trainer.losses.integrity import Integrity
from student_trainer.losses.output.parts import TeacherPart
from student_trainer.losses.rows import FullRows, GivenRows, HiddenRows, Seen, TeacherRows, TopKRows, seen_in_logits


@dataclass(eq=False)
class Read:
    """Of one teacher, a tensor for each chunk.

    Attributes:
        kd: losses by row, without any factor.
        clipped: rows that a policy gradient has clipped.
        likeliest: int64, its likeliest id of each row.
        seen: what its logits say of the labels; nothing from top-k rows, of which it is found without.
    """

    kd: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    likeliest: list[Tensor] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    def look(self, rows: TeacherRows, label_ids_P: Tensor) -> None:
        """At the rows of a chunk, which are `opened`."""
        if isinstance(rows, FullRows):
            self.seen.append(seen_in_logits(rows.logits_NV, label_ids_P))
            self.likeliest.append(rows.logits_NV.argmax(-1))
        elif isinstance(rows, TopKRows):
            best_P1 = rows.topk_logits_NK.argmax(-1, keepdim=True)
            self.likeliest.append(rows.topk_ids_NK.gather(-1, best_P1)[:, 0])


def opened(rows: TeacherRows, dtype: torch.dtype) -> TeacherRows:
    """With logits in place of states, so that they are computed once however often they are read; of a chunk alone."""
    if not isinstance(rows, HiddenRows | FullRows):
        return rows
    return FullRows(rows.logits(dtype), rows.lse_N, rows.label_logp_N, rows.tolerance)


def evidence_of(part: TeacherPart, read: Read, kept_M: Tensor, labels_M: Tensor) -> Integrity | None:
    """What `Integrity.check` will look at, of the rows that were used; the comparison is under way already. None of given rows.

    Args:
        kept_M: on the host, which of the N rows of the call the M kept ones are.
        labels_M: on the device.
    """
    if isinstance(part.rows, GivenRows) or not len(part.place):
        return None
    row_P = part.row.part(0, len(part.row))
    if isinstance(part.rows, TopKRows):
        seen = part.rows.take(row_P).seen(labels_M[part.place.part(0, len(part.place))])
    else:
        seen = Seen(*(torch.cat(column) for column in zip(*read.seen, strict=True)))
    checked = part.rows.checked if isinstance(part.rows, HiddenRows) else None
    if checked is not None:  # of the rows left out some may be among the checked: so many are looked at at least
        checked = max(1, checked - (part.rows.lse_N.numel() - len(part.row)))
    number_P = kept_M[torch.from_numpy(part.place.host_P)].to(labels_M.device, non_blocking=True)
    served = part.rows.lse_N[row_P], part.rows.label_logp_N[row_P]
    evidence = Integrity(
        number_P, served[0], seen.lse_C, served[1], seen.label_logp_C, part.rows.tolerance, checked, part.name
    )
    evidence.begin()
    return evidence
