"""Sums of a micro-batch with several teachers: of the whole, and of each teacher.

In: what was read of each teacher, chunk by chunk. Out: float64 on the device.

Axes: M rows of weight above 0, P of them that a teacher has a distribution of, G groups of tokens that are compared as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from student_trainer.losses.output.joined.agreement import agreements
from student_trainer.losses.output.joined.evidence import Read
from student_trainer.losses.output.loss import LossParts
from student_trainer.losses.output.parts import Joining, TeacherPart
from student_trainer.losses.output.spec import OutputLossSpec


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


def teacher_figures(part: TeacherPart, read: Read, sampled_M: Tensor | None, spec: OutputLossSpec) -> TeacherFigures:
    """Of one teacher that has answered; without what it has in common with others."""
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
    if read.safe:
        safe_P = torch.cat(read.safe)
        weight_P = weight_P.masked_fill(~safe_P, 0)
        covered = covered - part.own_weight_P.masked_fill(safe_P, 0).sum()
    return TeacherFigures(kd_sum, weight_P.sum(), alm_sum, alm_weights, covered, nothing, nothing)


def whole(
    kd_sum: Tensor,
    read: dict[str, Read],
    parts: list[TeacherPart],
    logp: list[Tensor],
    ahead: list[Tensor],
    weights_M: Tensor,
    own_M: Tensor,
    sampled_M: Tensor | None,
    spec: OutputLossSpec,
) -> LossParts:
    """As with one teacher; `logp` and `ahead` are of each chunk."""
    nothing = weights_M.new_zeros((), dtype=torch.float64)
    weights, ce_weights = weights_M.double().sum(), own_M.double().sum()
    kd_weights = weights if spec.policy_gradient is None else weights - ce_weights
    ahead_M = torch.cat(ahead) if ahead else weights_M[:0]
    return LossParts(
        kd_sum=kd_sum,
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


def kd_of(part: TeacherPart, figures: TeacherFigures) -> Tensor:
    """What a teacher gives to the sum of all."""
    if part.bridge is None:
        return figures.kd_sum
    return figures.kd_sum + part.bridge.alm_weight * figures.alm_sum


def by_teacher(
    joining: Joining,
    parts: list[TeacherPart],
    figures: dict[str, TeacherFigures],
    read: dict[str, Read],
    count: int,
    device: torch.device,
) -> dict[str, TeacherFigures]:
    """Of every teacher of the run: those that have not answered have figures of no rows."""
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    likeliest = {part.name: torch.cat(read[part.name].likeliest) for part in parts if read[part.name].likeliest}
    agreeing = agreements(parts, likeliest, count, device)
    told = {}
    for name in joining.teachers:
        agreed = agreeing.get(name, (nothing, nothing))
        found = figures.get(name) or TeacherFigures(*[nothing] * 7)
        told[name] = replace(found, agreeing=agreed[0], compared=agreed[1])
    return told
