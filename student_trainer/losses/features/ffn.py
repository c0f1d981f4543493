"""How much a block's FFN works at each token, compared between models of different widths (docs/concepts/method.md 6).

In: what enters `down_proj` of the student, or an energy per row of both models; out: figures per row, or a loss per sequence.

Axes: N rows, B sequences, F width of the FFN, Q quantiles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from student_trainer.losses.features.states import wide

QUANTILES = 16
FEWEST_ROWS = 4  # of a sequence; of fewer, a correlation says nothing


def energy(u_XF: Tensor) -> Tensor:
    """[X], log(norm(u) / sqrt(F) + 1e-6)."""
    return torch.log(torch.linalg.vector_norm(wide(u_XF), dim=-1) / math.sqrt(u_XF.shape[-1]) + 1e-6)


def profile(u_XF: Tensor) -> Tensor:
    """[X, Q], means of the sixteen equal parts of |u| / sum |u|, sorted from the largest."""
    size_XF = wide(u_XF).abs()
    share_XF = (size_XF / size_XF.sum(-1, keepdim=True).clamp_min(1e-12)).sort(dim=-1, descending=True).values
    return torch.stack([part.mean(-1) for part in share_XF.tensor_split(QUANTILES, dim=-1)], -1)


def quantile_distance(student_NQ: Tensor, teacher_NQ: Tensor) -> Tensor:
    """[N], sum of the absolute differences of two profiles, each scaled to a sum of 1, so that widths do not count."""
    ours_NQ, theirs_NQ = (p / p.sum(-1, keepdim=True).clamp_min(1e-12) for p in (student_NQ, teacher_NQ))
    return (ours_NQ - theirs_NQ).abs().sum(-1)


def uncorrelated(student_N: Tensor, teacher_N: Tensor, weights_N: Tensor, sequence_N: Tensor, sequences: int) -> Tensor:
    """[B], 1 - Pearson's correlation of the energies within each sequence; free of scale and offset. 1 where one of them does not vary.

    Args:
        weights_N: of the rows; those of weight 0 count for nothing.
        sequence_N: int64, 0..B-1.
        sequences: B.
    """

    def within(x_N: Tensor) -> Tensor:
        return x_N.new_zeros(sequences).index_add(0, sequence_N, x_N * weights_N)

    total_B = within(torch.ones_like(student_N)).clamp_min(1e-12)
    ours_N, theirs_N = (e_N - (within(e_N) / total_B)[sequence_N] for e_N in (student_N, teacher_N))
    common_B, own_B, their_B = within(ours_N * theirs_N), within(ours_N.square()), within(theirs_N.square())
    spread_B = (own_B * their_B + 1e-12 * total_B.square()).clamp_min(
        1e-30
    )  # of a sequence without a weight nothing is left
    return 1 - common_B * torch.rsqrt(spread_B)
