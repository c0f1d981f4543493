"""Groups of tokens whose borders differ between two tokenizers: how likely each model finds the same text, held against one another.

In: log-likelihoods of a text under teacher and student. Out: a binary cross-entropy at a temperature (ALM), and its slope.

Axes: G groups. Source: docs/concepts/method.md 8.4; Minixhofer et al. 2025 (arXiv 2503.20083).
"""

from __future__ import annotations

import torch
from torch import Tensor


def binarised(
    student_logp_G: Tensor, teacher_logp_G: Tensor, tokens_G: Tensor, temperature: float, smallest: float
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of a = p^(1 / temperature) and c = q^(1 / temperature), and its slope in log q.

    Args:
        student_logp_G, teacher_logp_G: float64, of the text of each group given all before it.
        tokens_G: of the student.
        smallest: 1 - q of a token that the student's dtype can still tell from 0. A group that the student is surer of than so many of
            its tokens allow is taken to be as sure as that: at q = 1 the cross-entropy is infinite, whatever the teacher says.
    Returns:
        loss_G in nats, slope_G.
    """
    logp_G = torch.minimum(student_logp_G, -tokens_G.double() * smallest) / temperature
    teacher_logp_G = teacher_logp_G / temperature
    a_G, not_a_G = teacher_logp_G.exp(), -torch.expm1(teacher_logp_G)
    rest_G = -torch.expm1(logp_G)  # 1 - c
    loss_G = -(a_G * logp_G + not_a_G * rest_G.log())
    slope_G = (not_a_G - rest_G) / rest_G / temperature  # (c - a) / (1 - c)
    return loss_G, slope_G


def sums_of(value_F: Tensor, begin_G1: Tensor) -> Tensor:
    """[G], sums of neighbours, those of group g from `begin_G1[g]` on; a difference of two running sums, whose order is always the same.

    Args:
        value_F: float64, finite.
        begin_G1: int64, from 0 to F.
    """
    before_F1 = torch.nn.functional.pad(value_F.cumsum(0), (1, 0))
    return before_F1[begin_G1[1:]] - before_F1[begin_G1[:-1]]
