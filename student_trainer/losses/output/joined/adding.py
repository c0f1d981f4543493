"""What each teacher gives to one chunk of rows.

In: a chunk with the student's logits, a teacher's part of the micro-batch; out: figures and evidence in its `Read`, gradients in the chunk.

Axes: C rows of a chunk, P of them that a teacher has a distribution of, G groups of tokens that are compared as a whole, F their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.cross_tokenizer.likelihood import binarised, sums_of
from student_trainer.losses.head import Head
from student_trainer.losses.output.joined import kernels
from student_trainer.losses.output.joined.chunk import Chunk, OwnFigures, Piece
from student_trainer.losses.output.joined.evidence import Read
from student_trainer.losses.output.joined.mixture import Mixture
from student_trainer.losses.output.parts import TeacherPart, on_device_together
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


class RowChunks:
    """All chunks of a micro-batch, one after the other, each row's logits side by side in memory; then `settle`.

    Args:
        read: of each teacher.
        mixture: of them; None for a sum.
        bounds: of the chunks among the M kept rows.
        labels_M, own_M: on the host: labels, and weights of the cross-entropy.
        sampled_M: as in `Chunk`, of all.
        is_fused: with kernels.
        dtypes: of the loss, and of gradients on logits.
    """

    def __init__(
        self,
        read: dict[str, Read],
        mixture: Mixture | None,
        bounds: Sequence[int],
        labels_M: np.ndarray,
        own_M: np.ndarray,
        sampled_M: Tensor | None,
        normalizer: float | Tensor,
        spec: OutputLossSpec,
        is_fused: bool,
        dtypes: tuple[torch.dtype, torch.dtype],
        device: torch.device,
    ) -> None:
        self._read, self._mixture, self._bounds, self._sampled_M = read, mixture, bounds, sampled_M
        self._labels_M, own = on_device_together([labels_M, own_M], device)
        self._dtype, self._grad_dtype = dtypes
        self._slope_M = spec.sft_weight * (own.to(self._dtype) / normalizer)  # of the loss in -log q(label)
        self._is_hard = spec.sft_weight > 0 or any(of.part.groups for of in read.values())
        self._kd_weight, self._normalizer = spec.kd_weight, normalizer
        self._spec = replace(spec, kd_weight=1.0, sft_weight=0.0)  # these are in what is added
        self._is_fused = is_fused
        self._own: list[OwnFigures] = []

    def chunk(self, number: int, h_CD: Tensor, head: Head, is_trained: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """Of one chunk: gradient on the logits with every factor, None if nothing is trained; logits; states."""
        start, stop = self._bounds[number : number + 2]
        z_CV, slope_C = head.logits(h_CD), self._slope_M[start:stop]
        sampled_C = None if self._sampled_M is None else self._sampled_M[start:stop]
        chunk = Chunk(z_CV, self._labels_M[start:stop], sampled_C, self._spec, self._is_fused, self._grad_dtype)
        if self._mixture is not None:
            factor = self._kd_weight / self._normalizer
            self._mixture.add(chunk, self._read, number, (start, stop), head.vocab_rows, factor, self._dtype)
        for read in self._read.values() if self._mixture is None else ():
            add(chunk, read, number, slope_C, start, self._dtype)
        self._own.append(chunk.own)
        return chunk.finish(slope_C if self._is_hard else None) if is_trained else None, z_CV, h_CD

    def settle(self) -> OwnFigures | None:
        """What was found of the student, row by row; None without a row."""
        return OwnFigures(*(torch.cat(column) for column in zip(*self._own, strict=True))) if self._own else None


def add(chunk: Chunk, read: Read, number: int, slope_C: Tensor, origin: int, dtype: torch.dtype) -> None:
    """A teacher's distributions in one chunk, and its groups that are compared as a whole: all of its rows are opened at once.

    Args:
        number: of the chunk.
        slope_C: slope of the loss in -log q(label) of each row, with every factor; that of the groups is added.
        origin: number of the chunk's first row among the kept ones.
    """
    if read.start_B1[number] == read.start_B1[number + 1]:
        return
    first, last = read.place_B1[number : number + 2]
    looked, count = read.look(number, dtype), last - first
    if count:
        some, rows = looked.part(slice(0, count)), len(slope_C)
        if some.likeliest_P is not None:
            read.likeliest.append(some.likeliest_P)
        where = read.where(number, rows)
        piece = Piece(where, some.rows, read.coefficient_P[first:last], lse_P=some.lse_P)
        if read.part.bridge is not None:
            piece = replace(piece, classes=read.part.bridge.classes)
            if isinstance(where, Tensor):
                piece = replace(piece, place_C=read.place_M[origin : origin + rows])
        found = chunk.add(piece)
        read.kd.append(found.kd_P)
        if found.clipped_P is not None:
            read.clipped.append(found.clipped_P)
        if found.safe_P is not None:
            read.safe.append(found.safe_P)
    if read.group_B1[number] < read.group_B1[number + 1]:
        teacher_logp_F = looked.label_logp_P[count:]
        add_groups(chunk.is_fused, chunk.own.label_logp_C, read, teacher_logp_F, number, slope_C, origin)


def add_groups(
    is_fused: bool,
    label_logp_C: Tensor,
    read: Read,
    teacher_logp_F: Tensor,
    number: int,
    slope_C: Tensor,
    origin: int,
) -> None:
    """The groups of one chunk; as `add`.

    Args:
        label_logp_C: log-probabilities of the labels under the student.
        teacher_logp_F: of the rows of these groups under the teacher, group by group.
    """
    first, last = read.group_B1[number : number + 2]
    groups, bridge, factor_G, alm_G = read.part.groups, read.part.bridge, read.factor_G, read.alm_G
    assert groups is not None and bridge is not None and factor_G is not None and alm_G is not None, "it has groups"
    smallest = torch.finfo(label_logp_C.dtype).eps
    if is_fused:
        kernels.add_group_slopes(
            *(slope_C, alm_G, label_logp_C, teacher_logp_F, groups, first, last, origin, factor_G),
            *(bridge.alm_temperature, smallest),
        )
        return
    begin, end = int(groups.student_start_G1[first]), int(groups.student_start_G1[last])
    row_F = groups.student_row_F[begin:end] - origin
    student_logp_G = sums_of(label_logp_C[row_F].double(), groups.student_begin_G1[first : last + 1] - begin)
    teacher_begin = int(groups.teacher_start_G1[first])
    teacher_logp_G = sums_of(teacher_logp_F.double(), groups.teacher_begin_G1[first : last + 1] - teacher_begin)
    alm_G[first:last], slope_G = binarised(
        student_logp_G, teacher_logp_G, groups.tokens_G[first:last], bridge.alm_temperature, smallest
    )
    of_G = -slope_G.to(factor_G.dtype) * factor_G[first:last]
    slope_C.index_add_(0, row_F, of_G[groups.student_group_F[begin:end] - first])  # no row comes twice
