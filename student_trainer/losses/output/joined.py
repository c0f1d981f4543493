"""The loss on output distributions with several teachers: one pass through the student's head, every teacher's part on each chunk.

In: the student's states after its final norm, its head, what every teacher has answered and its share of each row. Out: one number that
carries the graph, figures of all and of each teacher, the evidence of each.
Must never hold more than a chunk of logits, nor wait for the device: labels, weights, shares and places are on the host.

Axes: N rows, M rows of weight above 0, C rows of a chunk, P rows that a teacher has a distribution of, V ids of the student.
Source: algorithms.md 3.2, 8.4, 9.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from student_trainer.errors import ConfigError, DataError
from student_trainer.losses import fused
from student_trainer.losses.cross_tokenizer.likelihood import binarised, sums_of
from student_trainer.losses.head import Head, if_trained
from student_trainer.losses.integrity import Integrity
from student_trainer.losses.matmul import wide
from student_trainer.losses.output.agreement import agreements
from student_trainer.losses.output.chunks import has_kernel
from student_trainer.losses.output.evidence import Read, evidence_of
from student_trainer.losses.output.gradients import Attach, Gradients
from student_trainer.losses.output.joined_chunk import Chunk, Piece
from student_trainer.losses.output.loss import LossParts, check_sampled, check_values
from student_trainer.losses.output.parts import Joining, Kept, LongGroups, TeacherPart, chunk_bounds, on_device, part_of
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
        alm_sum, alm_weights: of the losses of groups, each times the w_n share_n of its rows together, and of these weights; 0 for the
            student's tokenizer.
        covered: weight of the rows that have its labels.
        agreeing, compared: rows in which another teacher has the same likeliest id, of those of which another has a distribution.
    """

    kd_sum: Tensor
    kd_weights: Tensor
    alm_sum: Tensor
    alm_weights: Tensor
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
    kept = Kept(kept_M.numpy(), weights_M.double().numpy(), label_ids_N)
    parts = [
        part_of(name, joined.by_name[name], kept, device, dtype) for name in joining.teachers if name in joined.by_name
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
        is_hard = spec.sft_weight > 0 or any(part.groups for part in parts)
        hard_M = spec.sft_weight * (own_M.to(dtype) / normalizer)
        bounds = chunk_bounds(count, _chunk_rows(parts, head, spec), [p.groups for p in parts if p.groups is not None])
        for start, stop in pairwise(bounds):
            index_C = slice(start, stop) if index_M is None else index_M[start:stop]
            h_CD, labels_C = student_hidden_ND[index_C], labels_M[start:stop]
            z_CV = head.logits(h_CD)
            sampled_C = None if sampled_M is None else sampled_M[start:stop]
            chunk = Chunk(z_CV, labels_C, sampled_C, spec, is_fused)
            slope_C = hard_M[start:stop]
            for part in parts:
                _add(chunk, part, read[part.name], (start, stop), normalizer, dtype)
                if part.groups is not None:
                    slope_C = slope_C + _add_groups(
                        chunk, part, part.groups, read[part.name], (start, stop), normalizer, spec
                    )
            logp.append(chunk.own.label_logp_C)
            ahead.append(chunk.own.ahead_C)
            if any(t is not None for t in trained):
                grad_CV = chunk.finish(slope_C if is_hard else None)
                gradients.add(head.pull_back_(grad_CV, z_CV), h_CD, index_C, head)
                del grad_CV
            del z_CV, chunk  # not held while the next chunk's are made
        figures = {part.name: _figures(part, read[part.name], sampled_M, spec) for part in parts}
        losses = _parts(figures, read, parts, logp, ahead, weights_M, own_M, sampled_M, spec)
        total = (spec.kd_weight * losses.kd_sum + spec.sft_weight * losses.ce_sum) / (normalizer if count else 1)
        by_teacher = _by_teacher(joining, parts, figures, read, count, device)
    total = Attach.apply(total.to(dtype), *gradients.all(), *trained)
    evidence = (evidence_of(part, read[part.name]) for part in parts)
    return JoinedLoss(total, losses, by_teacher, tuple(found for found in evidence if found is not None))


def _chunk_rows(parts: list[TeacherPart], head: Head, spec: OutputLossSpec) -> int:
    """C; beside logits, log-probabilities and gradients over ids there are figures over classes, and the teacher's own logits."""
    bytes_each = 20
    for part in parts:
        if part.bridge is not None:
            classes = part.bridge.classes
            bytes_each = max(bytes_each, 20 + 4 * (classes.teacher_Vt.numel() + 2 * classes.classes) // head.vocab_rows)
    return spec.chunk_rows(head.vocab_rows, bytes_each)


def _add(
    chunk: Chunk,
    part: TeacherPart,
    read: Read,
    bounds: tuple[int, int],
    normalizer: float | Tensor,
    dtype: torch.dtype,
) -> None:
    """A teacher's distributions in one chunk."""
    first, last = (bisect_left(part.place.host_P, edge) for edge in bounds)
    if first == last:
        return
    rows, _ = read.look(part, part.row, first, last, dtype)
    read.note_likeliest(part, rows)
    where, classes = part.place.part(first, last, bounds[0]), None if part.bridge is None else part.bridge.classes
    found = chunk.add(Piece(where, rows, part.weight_P[first:last] / normalizer, classes))
    read.kd.append(found.kd_P)
    if found.clipped_P is not None:
        read.clipped.append(found.clipped_P)


def _add_groups(
    chunk: Chunk,
    part: TeacherPart,
    groups: LongGroups,
    read: Read,
    bounds: tuple[int, int],
    normalizer: float | Tensor,
    spec: OutputLossSpec,
) -> Tensor:
    """Groups that are compared as a whole, in one chunk: slope [C] of their loss in -log q(label) of each row, with every factor."""
    label_logp_C, bridge = chunk.own.label_logp_C, part.bridge
    slope_C = torch.zeros_like(label_logp_C)
    first, last = (bisect_left(groups.first_G, edge) for edge in bounds)
    if first == last or bridge is None:
        return slope_C
    begin, end = int(groups.student_start_G1[first]), int(groups.student_start_G1[last])
    row_F = groups.student.device_P[begin:end] - bounds[0]
    student_logp_G = sums_of(label_logp_C[row_F].double(), groups.student_start_G1[first : last + 1] - begin)
    begin, end = int(groups.teacher_start_G1[first]), int(groups.teacher_start_G1[last])
    _, logp_F = read.look(part, groups.teacher, begin, end, label_logp_C.dtype)
    teacher_logp_G = sums_of(logp_F.double(), groups.teacher_start_G1[first : last + 1] - begin)
    smallest = torch.finfo(label_logp_C.dtype).eps
    loss_G, slope_G = binarised(
        student_logp_G, teacher_logp_G, groups.tokens_G[first:last], bridge.alm_temperature, smallest
    )
    read.alm.append(loss_G)
    factor_G = groups.weight_G[first:last] * (spec.kd_weight * bridge.alm_weight) / normalizer
    of_G = -slope_G.to(factor_G.dtype) * factor_G
    begin, end = int(groups.student_start_G1[first]), int(groups.student_start_G1[last])
    return slope_C.index_copy_(0, row_F, of_G[groups.student_group_F[begin:end] - first])


def _figures(part: TeacherPart, read: Read, sampled_M: Tensor | None, spec: OutputLossSpec) -> TeacherFigures:
    weight_P = part.weight_P.double()
    nothing = weight_P.new_zeros(())
    kd_sum = weight_P @ torch.cat(read.kd).double() if read.kd else nothing
    if spec.policy_gradient is not None:
        weight_P = (
            weight_P * 0 if sampled_M is None else weight_P.masked_fill(sampled_M[part.place.device_P].isnan(), 0)
        )
    alm_sum = alm_weights = nothing
    if part.groups is not None and read.alm:
        weight_G = part.groups.weight_G.double()
        alm_sum, alm_weights = weight_G @ torch.cat(read.alm), weight_G.sum()
    covered = torch.full_like(nothing, part.covered)
    return TeacherFigures(kd_sum, weight_P.sum(), alm_sum, alm_weights, covered, nothing, nothing)


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
        kd_sum=sum((_whole(part, figures[part.name]) for part in parts), nothing),
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


def _whole(part: TeacherPart, figures: TeacherFigures) -> Tensor:
    """What a teacher gives to the sum of all."""
    if part.bridge is None:
        return figures.kd_sum
    return figures.kd_sum + part.bridge.alm_weight * figures.alm_sum


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
        agreed = agreeing.get(name, (nothing, nothing))
        found = figures.get(name) or TeacherFigures(*[nothing] * 7)
        told[name] = replace(found, agreeing=agreed[0], compared=agreed[1])
    return told


def _check_part(part: TeacherPart, head: Head, spec: OutputLossSpec) -> None:
    """What can be told from shapes and settings.

    Raises:
        ConfigError, DataError: as `joined_loss`.
    """
    if isinstance(part.rows, GivenRows) and (spec.policy_gradient is None or part.bridge is not None):
        raise ConfigError(
            f"teacher {part.name!r}: given labels hold no distribution and serve divergence pg_rkl alone: choose another labels.transport"
        )
    transport = "top_k" if isinstance(part.rows, TopKRows) else "hidden or full"
    check_temperature(transport, spec.temperature, spec.tempered_head)
    if part.bridge is None:
        check_vocabulary(part.rows, head)
        return
    if spec.policy_gradient is not None or spec.tempered_head:
        raise ConfigError(
            f"teacher {part.name!r} has another tokenizer, which divergence pg_rkl and tempered_head do not know: choose another divergence, "
            "and labels.transport hidden for temperatures"
        )
    classes = part.bridge.classes
    ids = {"student": (classes.of_student.vocab_rows, head.vocab_rows)}
    ids["teacher"] = classes.of_teacher.vocab_rows, part.rows.vocab_rows or classes.of_teacher.vocab_rows
    for side, (classed, there) in ids.items():
        if classed != there:
            raise DataError(
                f"teacher {part.name!r}: classes of {classed} ids of the {side}, whose rows are over {there}"
            )
