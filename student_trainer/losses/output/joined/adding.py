"""What each teacher gives to one chunk of rows.

In: a chunk with the student's logits, a teacher's part of the micro-batch; out: figures and evidence in its `Read`, gradients in the chunk.

Axes: C rows of a chunk, P of them that a teacher has a distribution of, G groups of tokens that are compared as a whole, F their rows.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from student_trainer.losses.cross_tokenizer.likelihood import binarised, sums_of
from student_trainer.losses.head import Head
from student_trainer.losses.output.joined import kernels
from student_trainer.losses.output.joined.chunk import Chunk, Piece
from student_trainer.losses.output.joined.evidence import Read
from student_trainer.losses.output.parts import LongGroups, TeacherPart
from student_trainer.losses.output.spec import OutputLossSpec


def chunk_rows(parts: list[TeacherPart], head: Head, spec: OutputLossSpec, is_mixed: bool, is_fused: bool) -> int:
    """C; beside logits, log-probabilities and gradients over ids there are figures over classes, and the teacher's own logits.

    With kernels as many as with one teacher: fewer would read both heads more often. The pass holds up to three times as much then.
    """
    if is_fused:
        return spec.chunk_rows(head.vocab_rows, 12)
    bytes_each = 28 if is_mixed else 20
    for part in parts:
        if part.bridge is not None:
            classes = part.bridge.classes
            bytes_each = max(bytes_each, 20 + 4 * (classes.teacher_Vt.numel() + 2 * classes.classes) // head.vocab_rows)
    return spec.chunk_rows(head.vocab_rows, bytes_each)


def add(
    chunk: Chunk,
    part: TeacherPart,
    read: Read,
    bounds: tuple[int, int],
    normalizer: float | Tensor,
    spec: OutputLossSpec,
    dtype: torch.dtype,
) -> Tensor | None:
    """A teacher's distributions in one chunk, and its groups that are compared as a whole: all of its rows are opened at once.

    Returns:
        slope [C] of the groups' loss in -log q(label) of each row, with every factor; None if there are none.
    """
    first, last = (bisect_left(part.place.host_P, edge) for edge in bounds)
    groups, from_group, to_group = part.groups, 0, 0
    spans = [(part.row, first, last)]
    if groups is not None:
        from_group, to_group = (bisect_left(groups.first_G, edge) for edge in bounds)
        edges = int(groups.teacher_start_G1[from_group]), int(groups.teacher_start_G1[to_group])
        spans.append((groups.teacher, *edges))
    if all(start == stop for _, start, stop in spans):
        return None
    looked, count = read.look(part, spans, dtype), last - first
    if count:
        some = looked.part(slice(0, count))
        read.note_likeliest(part, some)
        where, classes = part.place.part(first, last, bounds[0]), None if part.bridge is None else part.bridge.classes
        found = chunk.add(Piece(where, some.rows, part.weight_P[first:last] / normalizer, classes, some.lse_P))
        read.kd.append(found.kd_P)
        if found.clipped_P is not None:
            read.clipped.append(found.clipped_P)
        if found.safe_P is not None:
            read.safe.append(found.safe_P)
    if groups is None or from_group == to_group:
        return None
    logp_F = looked.label_logp_P[count:]
    return _add_groups(chunk, part, groups, logp_F, read, (from_group, to_group), bounds[0], normalizer, spec)


def _add_groups(
    chunk: Chunk,
    part: TeacherPart,
    groups: LongGroups,
    teacher_logp_F: Tensor,
    read: Read,
    which: tuple[int, int],
    origin: int,
    normalizer: float | Tensor,
    spec: OutputLossSpec,
) -> Tensor:
    """Groups `which` of one chunk, whose first row is number `origin` of the kept ones; as `add` gives it."""
    (first, last), label_logp_C, bridge = which, chunk.own.label_logp_C, part.bridge
    assert bridge is not None, "groups are of a teacher with another tokenizer"
    smallest = torch.finfo(label_logp_C.dtype).eps
    factor_G = groups.weight_G[first:last] * (spec.kd_weight * bridge.alm_weight) / normalizer
    if chunk.is_fused:
        loss_G, slope_C = kernels.group_slopes(
            *(label_logp_C, teacher_logp_F, groups, first, last, origin, factor_G),
            *(bridge.alm_temperature, smallest),
        )
        read.alm.append(loss_G)
        return slope_C
    begin, end = int(groups.student_start_G1[first]), int(groups.student_start_G1[last])
    row_F = groups.student.device_P[begin:end] - origin
    student_logp_G = sums_of(label_logp_C[row_F].double(), groups.student_begin_G1[first : last + 1] - begin)
    teacher_begin = int(groups.teacher_start_G1[first])
    teacher_logp_G = sums_of(teacher_logp_F.double(), groups.teacher_begin_G1[first : last + 1] - teacher_begin)
    loss_G, slope_G = binarised(
        student_logp_G, teacher_logp_G, groups.tokens_G[first:last], bridge.alm_temperature, smallest
    )
    read.alm.append(loss_G)
    of_G = -slope_G.to(factor_G.dtype) * factor_G
    slope_C = torch.zeros_like(label_logp_C)
    return slope_C.index_copy_(0, row_F, of_G[groups.student_group_F[begin:end] - first])
