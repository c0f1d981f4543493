"""What is read of a teacher's rows while a loss runs over chunks of them: figures by row, and the evidence that they are its word.

In: rows of each chunk, opened to logits once; out: an `Integrity` of all that was read.

Axes: P rows of a teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses import fused
from student_trainer.losses.integrity import Integrity
from student_trainer.losses.output.parts import Index, TeacherPart, on_device
from student_trainer.losses.output.spec import OutputLossSpec
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
    """Of one teacher: in which order its rows are read, and what was found, with an entry for each chunk.

    Attributes:
        part: what is read.
        order: the rows, in the order in which they are read.
        bounds: of the chunks among the M kept rows.
        start_B1: on the host, where the rows of each chunk begin among them: those that are compared row by row, then those of its groups.
        place_B1: likewise where the first ones begin in `part.place`.
        group_B1: likewise which groups.
        local_P: int64, on the host, of each row of `part.place` which of its chunk's rows it is held against.
        coefficient_P: kd_weight times weight times share over the normalizer.
        factor_G: that of each group, with the weight of their loss; None without groups.
        kd: losses by row, without any factor.
        clipped: rows that a policy gradient has clipped.
        safe: rows that are compared over classes; nothing where all are.
        likeliest: int64, its likeliest id of each row that it has a distribution of.
        alm_G: losses of groups that are compared as a whole; None without groups.
        seen: what its logits say of their labels; nothing from top-k rows, of which it is found without.
    """

    part: TeacherPart
    order: Index
    bounds: Sequence[int]
    start_B1: list[int]
    place_B1: list[int]
    group_B1: list[int]
    local_P: np.ndarray
    coefficient_P: Tensor
    factor_G: Tensor | None
    kd: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    safe: list[Tensor] = field(default_factory=list)
    likeliest: list[Tensor] = field(default_factory=list)
    alm_G: Tensor | None = None
    seen: list[Seen] = field(default_factory=list)

    @classmethod
    def of(cls, part: TeacherPart, bounds: Sequence[int], normalizer: float | Tensor, spec: OutputLossSpec) -> Read:
        """Nothing is read yet; `bounds` are those of the chunks."""
        place_P, groups, device = part.place.host_P, part.groups, part.weight_P.device
        place_B1 = np.searchsorted(place_P, bounds)
        local_P = place_P - np.repeat(np.asarray(bounds)[:-1], np.diff(place_B1))
        coefficient_P = spec.kd_weight * (part.weight_P / normalizer)
        if groups is None or part.bridge is None:
            places = place_B1.tolist()
            return cls(part, part.row, bounds, places, places, [0] * len(bounds), local_P, coefficient_P, None)
        group_B1 = np.searchsorted(groups.first_G, bounds)
        edges_B1 = groups.teacher_start_G1[group_B1]
        spans = zip(pairwise(place_B1), pairwise(edges_B1), strict=True)
        order_R = [(part.row.host_P[slice(*one)], groups.teacher.host_P[slice(*long)]) for one, long in spans]
        order = Index.of(np.concatenate([part.row.host_P[:0], *(some for both in order_R for some in both)]), device)
        factor_G = groups.weight_G * (spec.kd_weight * part.bridge.alm_weight) / normalizer
        return cls(
            part, order, bounds, (place_B1 + edges_B1).tolist(), place_B1.tolist(), group_B1.tolist(), local_P,
            coefficient_P, factor_G, alm_G=torch.empty(len(groups), dtype=torch.float64, device=device),
        )  # fmt: skip

    @cached_property
    def rows(self) -> TeacherRows:
        """The teacher's rows in the order in which they are read; states and logits, of which no second copy should be held, as they are."""
        rows = self.part.rows
        return rows if isinstance(rows, HiddenRows | FullRows) or not len(self.order) else rows.take(self._at_R)

    @cached_property
    def labels_R(self) -> Tensor:
        """int64, the tokens that they describe, in that order."""
        return self.part.labels_R[self._at_R] if len(self.order) else self.part.labels_R[:0]

    @property
    def _at_R(self) -> slice | Tensor:
        return self.order.part(0, len(self.order))

    @cached_property
    def _local_P(self) -> Tensor:
        return on_device(torch.from_numpy(self.local_P), self.part.weight_P.device)

    @cached_property
    def place_M(self) -> Tensor:
        """int64, of each kept row its number among those of its chunk that are compared row by row, -1 for none."""
        place_M, starts = np.full(self.bounds[-1], -1), np.asarray(self.place_B1)
        place_P = self.part.place.host_P
        place_M[place_P] = np.arange(len(place_P)) - np.repeat(starts[:-1], np.diff(starts))
        return on_device(torch.from_numpy(place_M), self.part.weight_P.device)

    def where(self, chunk: int, rows: int) -> slice | Tensor:
        """Which of the rows of a chunk are compared row by row; all of them as a slice, which is no copy and no launch."""
        first, last = self.place_B1[chunk], self.place_B1[chunk + 1]
        return slice(0, rows) if last - first == rows else self._local_P[first:last]

    def look(self, chunk: int, dtype: torch.dtype) -> OpenedRows:
        """Opens the rows of a chunk and looks at them."""
        first, last = self.start_B1[chunk], self.start_B1[chunk + 1]
        taken = self.rows.take(slice(first, last) if self.rows is not self.part.rows else self.order.part(first, last))
        rows = opened(taken, dtype)
        if isinstance(rows, TopKRows):
            best_P = rows.topk_ids_NK.gather(-1, rows.topk_logits_NK.argmax(-1, keepdim=True))[:, 0]
            return OpenedRows(rows, rows.label_logp_N.to(dtype), None, best_P)
        if not isinstance(rows, FullRows):
            return OpenedRows(rows, rows.label_logp_N.to(dtype))
        seen, best_P = _seen(rows.logits_NV, self.labels_R[first:last])
        self.seen.append(seen)
        return OpenedRows(rows, seen.label_logp_C, seen.lse_C, best_P)


def likeliest_of(read: Read) -> Tensor | None:
    """int64, the likeliest id in each row that a teacher has a distribution of; of one with another tokenizer, an id of the student that
    stands for its class. None of given rows.
    """
    if not read.likeliest:
        return None
    best_P = torch.cat(read.likeliest)
    if read.part.bridge is None:
        return best_P
    classes = read.part.bridge.classes
    return classes.of_student.first_K[classes.teacher_Vt[best_P]]


def _seen(z_PV: Tensor, label_ids_P: Tensor) -> tuple[Seen, Tensor]:
    """`seen_in_logits` and the likeliest ids, by a kernel where there is one."""
    if z_PV.dtype != torch.float32 or not fused.usable(z_PV):
        return seen_in_logits(z_PV, label_ids_P), z_PV.argmax(-1)
    lse_P, logp_P, best_P = fused.row_best(z_PV, label_ids_P)
    return Seen(lse_P, logp_P), best_P


def opened(rows: TeacherRows, dtype: torch.dtype) -> TeacherRows:
    """With logits in place of states, so that they are computed once however often they are read; of a chunk alone."""
    if not isinstance(rows, HiddenRows | FullRows):
        return rows
    return FullRows(rows.logits(dtype), rows.lse_N, rows.label_logp_N, rows.tolerance)


def evidence_of(read: Read) -> Integrity | None:
    """What `Integrity.check` will look at, of the teacher's rows that were used, numbered as it has sent them; the comparison is under way
    already. None of given rows, or if none was used.
    """
    part, rows, used = read.part, read.part.rows, read.order
    if isinstance(rows, GivenRows) or not len(used):
        return None
    if isinstance(rows, TopKRows):
        seen = read.rows.seen(read.labels_R)  # type: ignore[union-attr]  # these are such rows too
    else:
        seen = Seen(*(torch.cat(column) for column in zip(*read.seen, strict=True)))
    at_R = used.part(0, len(used))
    lse_R, logp_R = rows.lse_N[at_R], rows.label_logp_N[at_R]
    checked = part.rows.checked if isinstance(part.rows, HiddenRows) else None
    if checked is not None and isinstance(part.rows, HiddenRows):
        told = part.rows.checked_row
        # Where it is not told which, of the rows left out some may be among the checked: so many are looked at at least.
        left_out = part.rows.lse_N.numel() - len(used)
        checked = max(1, checked - left_out) if told is None else int(np.isin(used.host_P, told).sum())
    evidence = Integrity(
        used.device_P, lse_R, seen.lse_C, logp_R, seen.label_logp_C, rows.tolerance, checked, part.name
    )
    evidence.begin()
    return evidence
