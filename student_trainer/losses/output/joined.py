"""The loss on output distributions with several teachers: one pass through the student's head, every teacher's part on each chunk.

In: the student's states after its final norm, its head, what every teacher has answered and its share of each row. Out: one number that
carries the graph, figures of all and of each teacher, the evidence of each.
Must never hold more than a chunk of logits, nor wait for the device: labels, weights, shares and places are on the host.

Axes: N rows, M rows of weight above 0, C rows of a chunk, P rows that a teacher has a distribution of, V ids of the student.
Source: algorithms.md 3.2, 8.4, 9.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from student_trainer.errors import ConfigError, DataError
from student_trainer.losses import fused
from student_trainer.losses.head import Head, if_trained
from student_trainer.losses.integrity import Integrity
from student_trainer.losses.matmul import wide
from student_trainer.losses.output.agreement import agreements
from student_trainer.losses.output.chunks import has_kernel
from student_trainer.losses.output.evidence import Read, evidence_of, opened
from student_trainer.losses.output.gradients import Attach, Gradients
from student_trainer.losses.output.joined_chunk import Chunk, Piece
from student_trainer.losses.output.loss import LossParts, check_sampled, check_values
from student_trainer.losses.output.parts import Joining, TeacherPart, chunk_bounds, on_device, part_of
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import GivenRows, TopKRows, check_vocabulary
from student_trainer.losses.term import JoinedLabels
from student_trainer.losses.truncated import check_temperature


@dataclass(frozen=True, eq=False)
class TeacherFigures:
    """Of one teacher, detached float64 sums on the device.

    Attributes:
        kd_sum: of w_n share_n s(tau) D_n, over the rows of which it has a distribution.
        kd_weights: of w_n share_n, over the same.
        covered: weight of the rows that have its labels.
        agreeing, compared: rows in which another teacher has the same likeliest id, of those of which another has a distribution.
    """

    kd_sum: Tensor
    kd_weights: Tensor
    covered: Tensor
    agreeing: Tensor
    compared: Tensor


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
) -> JoinedLoss:
    """Distillation from several teachers, and cross-entropy, of N rows.

    Args:
        student_hidden_ND, head, normalizer, spec: as of `output_loss`.
        joined: what the teachers have answered, with their shares; rows in which all shares are 0 have their cross-entropy alone.
        joining: how their parts are joined.
        label_ids_N, weights_N, sampled_logp_N: as of `output_loss`, on the host.
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
    parts = [
        part_of(name, joined.by_name[name], kept_M.numpy(), weights_N.detach().numpy(), device, dtype)
        for name in joining.teachers
        if name in joined.by_name
    ]
    for part in parts:
        _check_part(part, head, spec)
    own_M = weights_M if sampled_M is None else weights_M.masked_fill(~sampled_M.isnan(), 0)  # of the data's tokens
    index_M = None if count == weights_N.numel() else on_device(kept_M, device)  # all: slices, no copies
    labels_M, weights_M, own_M = (on_device(there, device) for there in (labels_M, weights_M, own_M))
    sampled_M = None if sampled_M is None else on_device(sampled_M.to(dtype), device)
    is_fused = (
        dtype == torch.float32
        and fused.usable(student_hidden_ND)
        and all(has_kernel(part.rows, spec) for part in parts)
    )
    trained = (if_trained(student_hidden_ND), *head.trained())
    gradients = Gradients(*(None if t is None else torch.zeros_like(t, dtype=dtype) for t in trained))
    read = {part.name: Read() for part in parts}
    logp: list[Tensor] = []
    ahead: list[Tensor] = []
    with torch.no_grad():
        hard_M = spec.sft_weight * (own_M.to(dtype) / normalizer)
        bounds = chunk_bounds(count, spec.chunk_rows(head.vocab_rows, 20), ())
        for start, stop in pairwise(bounds):
            index_C = slice(start, stop) if index_M is None else index_M[start:stop]
            h_CD, labels_C = student_hidden_ND[index_C], labels_M[start:stop]
            z_CV = head.logits(h_CD)
            sampled_C = None if sampled_M is None else sampled_M[start:stop]
            chunk = Chunk(z_CV, labels_C, sampled_C, spec, is_fused)
            for part in parts:
                _add(chunk, part, read[part.name], (start, stop), labels_M, normalizer, dtype)
            logp.append(chunk.own.label_logp_C)
            ahead.append(chunk.own.ahead_C)
            if any(t is not None for t in trained):
                grad_CV = chunk.finish(hard_M[start:stop] if spec.sft_weight else None)
                gradients.add(head.pull_back_(grad_CV, z_CV), h_CD, index_C, head)
                del grad_CV
            del z_CV, chunk  # not held while the next chunk's are made
        figures = {part.name: _figures(part, read[part.name], sampled_M, spec) for part in parts}
        losses = _parts(figures, read, parts, logp, ahead, weights_M, own_M, sampled_M, spec)
        total = (spec.kd_weight * losses.kd_sum + spec.sft_weight * losses.ce_sum) / (normalizer if count else 1)
        by_teacher = _by_teacher(joining, parts, figures, read, count, device)
    total = Attach.apply(total.to(dtype), *gradients.all(), *trained)
    evidence = (evidence_of(part, read[part.name], kept_M, labels_M) for part in parts)
    return JoinedLoss(total, losses, by_teacher, tuple(found for found in evidence if found is not None))


def _add(
    chunk: Chunk,
    part: TeacherPart,
    read: Read,
    bounds: tuple[int, int],
    labels_M: Tensor,
    normalizer: float | Tensor,
    dtype: torch.dtype,
) -> None:
    """A teacher's part on one chunk."""
    first, last = (bisect_left(part.place.host_P, edge) for edge in bounds)
    if first == last:
        return
    where = part.place.part(first, last, bounds[0])
    rows = opened(part.rows.take(part.row.part(first, last)), dtype)
    read.look(rows, labels_M[part.place.part(first, last)])
    found = chunk.add(Piece(where, rows, part.weight_P[first:last] / normalizer))
    read.kd.append(found.kd_P)
    if found.clipped_P is not None:
        read.clipped.append(found.clipped_P)


def _figures(part: TeacherPart, read: Read, sampled_M: Tensor | None, spec: OutputLossSpec) -> TeacherFigures:
    weight_P = part.weight_P.double()
    nothing = weight_P.new_zeros(())
    kd_sum = weight_P @ torch.cat(read.kd).double() if read.kd else nothing
    if spec.policy_gradient is not None:
        weight_P = (
            weight_P * 0 if sampled_M is None else weight_P.masked_fill(sampled_M[part.place.device_P].isnan(), 0)
        )
    return TeacherFigures(kd_sum, weight_P.sum(), torch.full_like(nothing, part.covered), nothing, nothing)


def _parts(
    figures: dict[str, TeacherFigures],
    read: dict[str, Read],
    parts: list[TeacherPart],
    logp: list[Tensor],
    ahead: list[Tensor],
    weights_M: Tensor,
    own_M: Tensor,
    sampled_M: Tensor | None,
    spec: OutputLossSpec,
) -> LossParts:
    """The whole, as with one teacher."""
    nothing = weights_M.new_zeros((), dtype=torch.float64)
    weights, ce_weights = weights_M.double().sum(), own_M.double().sum()
    kd_weights = weights if spec.policy_gradient is None else weights - ce_weights
    ahead_M = torch.cat(ahead) if ahead else weights_M[:0]
    return LossParts(
        kd_sum=sum((found.kd_sum for found in figures.values()), nothing),
        ce_sum=own_M.double() @ -torch.cat(logp).double() if logp else nothing,
        acc1_hits=(ahead_M < 1).sum().double(),
        acc3_hits=(ahead_M < 3).sum().double(),
        rows=torch.full_like(nothing, float(weights_M.numel())),
        weights=weights,
        kd_weights=kd_weights,
        ce_weights=ce_weights,
        clipped=sum(
            (p.weight_P.double() @ torch.cat(read[p.name].clipped).double() for p in parts if read[p.name].clipped),
            nothing,
        ),
    )


def _by_teacher(
    joining: Joining,
    parts: list[TeacherPart],
    figures: dict[str, TeacherFigures],
    read: dict[str, Read],
    count: int,
    device: torch.device,
) -> dict[str, TeacherFigures]:
    """Of every teacher of the run: those that have not answered have figures of no rows."""
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    likeliest = {part.name: torch.cat(found) for part in parts if (found := read[part.name].likeliest)}
    agreeing = agreements(parts, likeliest, count, device)
    told = {}
    for name in joining.teachers:
        found = figures.get(name, TeacherFigures(nothing, nothing, nothing, nothing, nothing))
        told[name] = TeacherFigures(
            found.kd_sum, found.kd_weights, found.covered, *agreeing.get(name, (nothing, nothing))
        )
    return told


def _check_part(part: TeacherPart, head: Head, spec: OutputLossSpec) -> None:
    """What can be told from shapes and settings.

    Raises:
        ConfigError, DataError: as `joined_loss`.
    """
    if isinstance(part.rows, GivenRows) and spec.policy_gradient is None:
        raise ConfigError(
            f"teacher {part.name!r}: given labels hold no distribution and serve divergence pg_rkl alone: choose another labels.transport"
        )
    transport = "top_k" if isinstance(part.rows, TopKRows) else "hidden or full"
    check_temperature(transport, spec.temperature, spec.tempered_head)
    check_vocabulary(part.rows, head)
