"""Reverse KL on the student's own samples as a policy gradient, of which the teacher's log-probability of each token is all it needs.

In: log-probabilities of the sampled tokens under the student now, under the weights that sampled them, and under the teacher. Out: the
clipped surrogate of every row and its slope. Its expectation over the student's samples has the gradient of KL(student | teacher) over the
whole vocabulary, exactly, while the weights that sampled are the present ones.
Must never give a gradient to the advantage, nor say anything about a token that the student has not sampled.

Axes: C rows of a chunk. Source: docs/concepts/method.md 10; Schulman et al. 2017 (clipping).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from student_trainer.errors import ConfigError


@dataclass(frozen=True)
class PolicyGradient:
    """How far one step may go on samples of older weights.

    Attributes:
        clip: a row stops to teach once its probability has changed, in the direction of its advantage, by more than this share of what
            it was when the token was sampled. Infinity clips nothing.
    Raises:
        ConfigError: it is not above 0.
    """

    clip: float = 0.2

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ConfigError(f"clip of pg_rkl must be above 0, not {self.clip}")


class Surrogate(NamedTuple):
    """Of a chunk.

    Attributes:
        loss_C: -min(ratio A, clipped ratio A); 0 in rows that were not sampled.
        slope_C: its derivative in log q(token).
        clipped_C: bool, rows that were sampled and teach nothing any more.
    """

    loss_C: Tensor
    slope_C: Tensor
    clipped_C: Tensor


def surrogate(log_q_C: Tensor, sampled_logp_C: Tensor, teacher_logp_C: Tensor, how: PolicyGradient) -> Surrogate:
    """The surrogate -min(r A, clip(r) A) with r = q / q_sampled and the advantage A = log p - log q_sampled, a constant.

    At r = 1 the loss of a row is log q - log p, one sample of the reverse KL in nats, so its mean in the log is an estimate of that.

    Args:
        log_q_C: of the sampled token under the student now, at temperature 1.
        sampled_logp_C: when it was sampled; NaN where the token is the data's own.
        teacher_logp_C: under the teacher, at temperature 1.
        how: the clipping.
    """
    is_own_C = sampled_logp_C.isnan()
    advantage_C = teacher_logp_C - sampled_logp_C
    ratio_C = (log_q_C - sampled_logp_C).exp()
    clipped_C = torch.where(advantage_C > 0, ratio_C > 1 + how.clip, ratio_C < 1 - how.clip)
    taken_C = torch.where(clipped_C, ratio_C.clamp(1 - how.clip, 1 + how.clip), ratio_C)
    loss_C = (-taken_C * advantage_C).masked_fill_(is_own_C, 0)
    slope_C = (-ratio_C * advantage_C).masked_fill_(clipped_C | is_own_C, 0)
    return Surrogate(loss_C, slope_C, clipped_C & ~is_own_C)
