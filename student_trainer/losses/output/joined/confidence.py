"""Shares of teachers by how sure they are (`confidence`): a share times exp(-entropy), divided among those that have the row.

In: the parts of all teachers in a micro-batch; out: the same with other weights. Costs a second pass through every teacher's head: all
entropies of a row must be known before any part of its loss. Entropies are in nats at temperature 1; those of truncated rows are over
the kept ids and one for the rest, which is less, so that a teacher with `top_k` labels seems surer than it is. Has no gradient.
Where a teacher has another tokenizer, rows cannot be compared one by one: then every share is decided by the mean over a sequence.

Axes: N supervised rows, M kept rows, P of them that a teacher has a distribution of, G groups, F their rows, B sequences.
Source: docs/concepts/method.md 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.output.joined.evidence import opened
from student_trainer.losses.output.parts import Index, TeacherPart, on_device
from student_trainer.losses.rows import FullRows, TopKRows


def by_confidence(
    parts: Sequence[TeacherPart], sequence_M: np.ndarray | None, chunk_rows: int, count: int, dtype: torch.dtype
) -> list[TeacherPart]:
    """The parts with weights by entropy.

    Args:
        sequence_M: int64, on the host, of each kept row; needed where a teacher has another tokenizer.
        chunk_rows: logits held at a time.
        count: M.
    """
    if not parts:
        return []
    device = parts[0].weight_P.device
    if any(part.bridge is not None for part in parts):
        entropies = [_of_sequences(part, sequence_M, chunk_rows, dtype) for part in parts]
    else:
        entropies = [_by_row(part, chunk_rows, count, dtype) for part in parts]
    sure_TM = torch.stack(entropies).neg().exp()
    share_TM = torch.stack([on_device(torch.from_numpy(part.share_M), device) for part in parts]).double()
    whole_M = (share_TM * sure_TM).sum(0)
    factor_TM = sure_TM * share_TM.sum(0) / torch.where(whole_M > 0, whole_M, 1.0)
    return [_weighted(part, factor_M) for part, factor_M in zip(parts, factor_TM, strict=True)]


def _weighted(part: TeacherPart, factor_M: Tensor) -> TeacherPart:
    """With every weight times a factor of its row; rows of a group have the same."""
    weight_P = (part.weight_P.double() * factor_M[part.place.device_P]).to(part.weight_P.dtype)
    groups = part.groups
    if groups is not None and len(groups):
        first_G = on_device(torch.from_numpy(groups.first_G), factor_M.device)
        groups = replace(groups, weight_G=(groups.weight_G.double() * factor_M[first_G]).to(groups.weight_G.dtype))
    return replace(part, weight_P=weight_P, groups=groups)


def _by_row(part: TeacherPart, chunk_rows: int, count: int, dtype: torch.dtype) -> Tensor:
    """float64 [M]; 0 where it has no row, and no share either."""
    entropy_P = _of_rows(part, part.row, chunk_rows, dtype)
    return entropy_P.new_zeros(count).index_copy_(0, part.place.device_P, entropy_P)


def _of_sequences(part: TeacherPart, sequence_M: np.ndarray | None, chunk_rows: int, dtype: torch.dtype) -> Tensor:
    """float64 [M], the mean over the used rows of the row's sequence; infinite where it has none, and teaches nothing."""
    assert sequence_M is not None, "rows of a run with several teachers know their places"
    used, sequence_R = part.row, sequence_M[part.place.host_P]
    entropy_R = _of_rows(part, used, chunk_rows, dtype)
    if part.groups is not None and len(part.groups):
        groups = part.groups
        sizes_G = np.diff(groups.teacher_start_G1)
        sequence_R = np.concatenate([sequence_R, np.repeat(sequence_M[groups.first_G], sizes_G)])
        entropy_R = torch.cat([entropy_R, _of_rows(part, groups.teacher, chunk_rows, dtype)])
    device, sequences = entropy_R.device, int(sequence_M.max(initial=-1)) + 1
    is_of_BR = np.arange(sequences)[:, None] == sequence_R[None]
    share_BR = is_of_BR / np.maximum(is_of_BR.sum(1, keepdims=True), 1)
    mean_B = on_device(torch.from_numpy(share_BR), device) @ entropy_R
    mean_B[on_device(torch.from_numpy(~is_of_BR.any(1)), device)] = torch.inf
    return mean_B[on_device(torch.from_numpy(sequence_M), device)]


def _of_rows(part: TeacherPart, index: Index, chunk_rows: int, dtype: torch.dtype) -> Tensor:
    """float64 [P], entropies of some rows of a teacher."""
    found = [part.weight_P.new_zeros(0, dtype=torch.float64)]
    for start in range(0, len(index), chunk_rows):
        rows = opened(part.rows.take(index.part(start, min(start + chunk_rows, len(index)))), dtype)
        if isinstance(rows, FullRows):
            log_p = rows.logits_NV.log_softmax(-1)
        else:
            assert isinstance(rows, TopKRows), "given rows are refused before"
            topk_logp, tail_logp = rows.bucket(dtype)
            log_p = torch.cat([topk_logp, tail_logp[:, None]], -1)
        found.append(-torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p).sum(-1).double())
    return torch.cat(found)
