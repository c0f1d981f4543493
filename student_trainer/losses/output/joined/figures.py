"""Sums of a micro-batch with several teachers: of the whole, and of each teacher.

In: what was read of each teacher, chunk by chunk. Out: float64 on the device.

Axes: M rows of weight above 0, P of them that a teacher has a distribution of, G groups of tokens that are compared as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.output.joined.agreement import agreements
from student_trainer.losses.output.joined.chunk import OwnFigures
from student_trainer.losses.output.joined.evidence import Read, likeliest_of
from student_trainer.losses.output.loss import LossParts
from student_trainer.losses.output.parts import Joining, TeacherPart, on_device_together
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


def teacher_figures(read: Read, sampled_M: Tensor | None, spec: OutputLossSpec) -> TeacherFigures:
    """Of one teacher that has answered; without what it has in common with others."""
    part = read.part
    weight_P = part.weight_P.double()
    nothing = weight_P.new_zeros(())
    kd_sum = weight_P @ torch.cat(read.kd).double() if read.kd else nothing
    if spec.policy_gradient is not None:
        weight_P = (
            weight_P * 0 if sampled_M is None else weight_P.masked_fill(sampled_M[part.place.device_P].isnan(), 0)
        )
    alm_sum = alm_weights = nothing
    if part.groups is not None and read.alm_G is not None and len(part.groups):
        weight_G = part.groups.weight_G.double()
        alm_sum, alm_weights = weight_G @ read.alm_G, weight_G.sum()
    if not read.safe:
        return TeacherFigures(kd_sum, weight_P.sum(), alm_sum, alm_weights, nothing + part.covered, nothing, nothing)
    safe_P = torch.cat(read.safe).double()
    covered = part.own_weight_P @ safe_P + (part.covered - part.compared)
    return TeacherFigures(kd_sum, weight_P @ safe_P, alm_sum, alm_weights, covered, nothing, nothing)


def whole(
    kd_sum: Tensor,
    read: dict[str, Read],
    own: OwnFigures | None,
    weights_M: Tensor,
    own_M: Tensor,
    spec: OutputLossSpec,
) -> LossParts:
    """As with one teacher.

    Args:
        weights_M, own_M: on the host: weights, and those of the cross-entropy.
    """
    nothing, own_weight_M = torch.zeros_like(kd_sum), own_M.double()
    known = np.array([weights_M.numel(), float(weights_M.double().sum()), float(own_weight_M.sum())])
    (rows, weights, ce_weights), own_weight_M = on_device_together([known, own_weight_M.numpy()], kd_sum.device)
    ce_sum = acc1_hits = acc3_hits = nothing
    if own is not None:
        ce_sum = own_weight_M @ -own.label_logp_C.double()
        acc1_hits, acc3_hits = (own.ahead_C < 1).sum().double(), (own.ahead_C < 3).sum().double()
    return LossParts(
        kd_sum=kd_sum,
        ce_sum=ce_sum,
        acc1_hits=acc1_hits,
        acc3_hits=acc3_hits,
        rows=rows,
        weights=weights,
        kd_weights=weights if spec.policy_gradient is None else weights - ce_weights,
        ce_weights=ce_weights,
        clipped=sum(
            (one.part.weight_P.double() @ torch.cat(one.clipped).double() for one in read.values() if one.clipped),
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
    figures: dict[str, TeacherFigures],
    read: dict[str, Read],
    count: int,
    device: torch.device,
) -> dict[str, TeacherFigures]:
    """Of every teacher of the run: those that have not answered have figures of no rows."""
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    agreeing: dict[str, tuple[Tensor, Tensor]] = {}
    if len(read) > 1:
        found = {name: likeliest_of(of_teacher) for name, of_teacher in read.items()}
        likeliest = {name: best_P for name, best_P in found.items() if best_P is not None}
        agreeing = agreements([of_teacher.part for of_teacher in read.values()], likeliest, count, device)
    told = {}
    for name in joining.teachers:
        agreed = agreeing.get(name, (nothing, nothing))
        own = figures.get(name) or TeacherFigures(*[nothing] * 7)
        told[name] = replace(own, agreeing=agreed[0], compared=agreed[1])
    return told
