"""The loss on output distributions with several teachers: one pass through the student's head, every teacher's part on each chunk.

In: the student's states after its final norm, its head, what every teacher has answered and its share of each row. Out: one number that
carries the graph, figures of all and of each teacher, the evidence of each.
Must never hold more than a chunk of logits, nor wait for the device: labels, weights, shares and places are on the host.

Axes: N rows, M rows of weight above 0, C rows of a chunk, P rows that a teacher has a distribution of, V ids of the student.
Source: docs/concepts/method.md 3.2, 8.4, 9.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from student_trainer.errors import DataError
from student_trainer.losses import fused
from student_trainer.losses.head import Head, if_trained
from student_trainer.losses.integrity import Integrity
from student_trainer.losses.matmul import wide
from student_trainer.losses.output.chunks import has_kernel
from student_trainer.losses.output.gradients import Attach, Gradients
from student_trainer.losses.output.joined.adding import RowChunks, chunk_rows
from student_trainer.losses.output.joined.checks import check_part
from student_trainer.losses.output.joined.confidence import by_confidence
from student_trainer.losses.output.joined.evidence import Read, evidence_of
from student_trainer.losses.output.joined.figures import TeacherFigures, by_teacher, kd_of, teacher_figures, whole
from student_trainer.losses.output.joined.mixture import Mixture
from student_trainer.losses.output.joined.transposed import TransposedChunks, serves
from student_trainer.losses.output.loss import LossParts, check_sampled, check_values, narrow
from student_trainer.losses.output.parts import Joining, Kept, chunk_bounds, on_device, part_of
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.term import JoinedLabels


@dataclass(frozen=True, eq=False)
class JoinedLoss:
    """`total` carries the graph; `by_teacher` has all of `Joining.teachers`, `integrity` is of those whose rows were read."""

    total: Tensor
    parts: LossParts
    by_teacher: dict[str, TeacherFigures]
    integrity: tuple[Integrity, ...]


def joined_loss(
    student_hidden_ND: Tensor,
    head: Head,
    joined: JoinedLabels,
    joining: Joining,
    label_ids_N: Tensor,
    weights_N: Tensor,
    normalizer: float | Tensor,
    spec: OutputLossSpec,
    sampled_logp_N: Tensor | None = None,
    sequence_N: np.ndarray | None = None,
) -> JoinedLoss:
    """Distillation from several teachers, and cross-entropy, of N rows.

    Args:
        student_hidden_ND, head, normalizer, spec: as of `output_loss`.
        joined: what the teachers have answered, with their shares; rows in which all shares are 0 have their cross-entropy alone.
        joining: how their parts are joined.
        label_ids_N, weights_N, sampled_logp_N: as of `output_loss`, on the host.
        sequence_N: int64, on the host: of each row its sequence; needed for `confidence` where a teacher has another tokenizer.
    Raises:
        ConfigError: labels that do not determine the loss asked for.
        DataError: lengths, a vocabulary, a label, a weight or a share that does not fit.
    """
    device, dtype = student_hidden_ND.device, wide(student_hidden_ND, head.weight_VD)
    for name, values in (("labels", label_ids_N), ("weights", weights_N), ("sampled_logp", sampled_logp_N)):
        if values is not None and values.numel() != student_hidden_ND.shape[0]:
            raise DataError(f"{values.numel()} {name} for {student_hidden_ND.shape[0]} student states")
    kept_M = weights_N.detach().nonzero()[:, 0]
    labels_M, weights_M, count = label_ids_N[kept_M], weights_N[kept_M].detach(), kept_M.numel()
    check_values(labels_M, weights_M, normalizer, head.vocab_rows)
    sampled_M = None if sampled_logp_N is None else sampled_logp_N[kept_M]
    if sampled_M is not None:
        check_sampled(sampled_M)
    kept = Kept(kept_M.numpy(), weights_M.double().numpy(), label_ids_N)
    parts = [
        part_of(name, joined.by_name[name], kept, device, dtype) for name in joining.teachers if name in joined.by_name
    ]
    for part in parts:
        check_part(part, head, spec, joining.combine)
    own_M = weights_M if sampled_M is None else weights_M.masked_fill(~sampled_M.isnan(), 0)  # of the data's tokens
    is_whole = count == weights_N.numel()
    index_M = kept_M if is_whole else on_device(kept_M, device)
    sampled_M = None if sampled_M is None else on_device(sampled_M.to(dtype), device)
    is_fused = (
        dtype == torch.float32
        and fused.usable(student_hidden_ND)
        and all(has_kernel(part.rows, spec) for part in parts)
    )
    trained = (if_trained(student_hidden_ND), *head.trained())
    grad_dtype = torch.bfloat16 if narrow(student_hidden_ND, head) else dtype
    gradients = Gradients(*(None if t is None else torch.zeros_like(t, dtype=dtype) for t in trained))
    mixture = Mixture(parts) if joining.combine == "prob_mix" else None
    with torch.no_grad():
        at_a_time = chunk_rows(parts, head, spec, mixture is not None, is_fused)
        if joining.combine == "confidence":
            sequence_M = None if sequence_N is None else sequence_N[kept.row_M]
            parts = by_confidence(parts, sequence_M, at_a_time, count, dtype)
        bounds = chunk_bounds(count, at_a_time, [p.groups for p in parts if p.groups is not None])
        read = {part.name: Read.of(part, bounds, normalizer, spec) for part in parts}
        host = bounds, labels_M.numpy(), own_M.numpy()
        chunks: RowChunks | TransposedChunks
        if is_fused and mixture is None and serves(parts, spec, count):
            chunks = TransposedChunks(read, *host, normalizer, spec, grad_dtype, device)
        else:
            dtypes = dtype, grad_dtype
            chunks = RowChunks(read, mixture, *host, sampled_M, normalizer, spec, is_fused, dtypes, device)
        is_trained = any(t is not None for t in trained)
        for number, (start, stop) in enumerate(pairwise(bounds)):
            index_C = slice(start, stop) if is_whole else index_M[start:stop]  # of all: no copies
            grad_CV, z_CV, h_CD = chunks.chunk(number, student_hidden_ND[index_C], head, is_trained)
            if grad_CV is not None:
                gradients.add(head.pull_back_(grad_CV, z_CV), h_CD, index_C, head)
            del grad_CV, z_CV  # not held while the next chunk's are made
        own = chunks.settle()
        figures = {part.name: teacher_figures(read[part.name], sampled_M, spec) for part in parts}
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        kd_sum = sum((kd_of(part, figures[part.name]) for part in parts), nothing)
        kd_sum = kd_sum if mixture is None else mixture.kd_sum(nothing)
        losses = whole(kd_sum, read, own, weights_M, own_M, spec)
        total = (spec.kd_weight * losses.kd_sum + spec.sft_weight * losses.ce_sum) / (normalizer if count else 1)
        told = by_teacher(joining, figures, read, count, device)
    total = Attach.apply(total.to(dtype), *gradients.all(), *trained)
    evidence = (evidence_of(found) for found in read.values())
    return JoinedLoss(total, losses, told, tuple(found for found in evidence if found is not None))
