"""Distances between the hidden states of two models of different widths (docs/concepts/method.md 4.2).

In: states of the student, projected or not, and of the teacher, of the same rows; out: a loss per row, or one number of all rows at hand.
Computed in float32, or in float64 where that is given. The teacher's side must not require gradients.

Axes: N rows, M sampled rows, D the student's width, R the width of the teacher's states as they travelled.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

MOST_SAMPLED = 512  # rows that `gram`, `cka` and `rkd` compare with one another
FEWEST_SAMPLED = 8  # below, what they say is chance


def wide(x: Tensor) -> Tensor:
    """`x` in float32, unless it is in float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def rms_normed(state_ND: Tensor) -> Tensor:
    """Each row divided by the root of its mean square: states of different scale become comparable."""
    state_ND = wide(state_ND)
    return state_ND * torch.rsqrt(state_ND.square().mean(-1, keepdim=True) + 1e-6)


def proj_cos(guess_NR: Tensor, target_NR: Tensor) -> Tensor:
    """[N], 1 - cosine, in 0..2."""
    return 1 - functional.cosine_similarity(guess_NR, target_NR, dim=-1, eps=1e-8)


def proj_sl1(guess_NR: Tensor, target_NR: Tensor) -> Tensor:
    """[N], mean over channels of the smooth L1 distance (beta 1) of the rows, each scaled to a root mean square of 1."""
    guess_NR, target_NR = rms_normed(guess_NR), rms_normed(target_NR)
    return functional.smooth_l1_loss(guess_NR, target_NR, reduction="none", beta=1.0).mean(-1)


def _centred_unit(state_MD: Tensor) -> Tensor:
    return functional.normalize(state_MD - state_MD.mean(0), dim=-1, eps=1e-8)


def gram(student_MD: Tensor, target_MR: Tensor) -> Tensor:
    """[], the mean squared difference of the cosines between rows, each model's centred over the rows."""
    ours_MD, theirs_MR = _centred_unit(student_MD), _centred_unit(target_MR)
    return (ours_MD @ ours_MD.T - theirs_MR @ theirs_MR.T).square().mean()


def debiased_cka(one_MD: Tensor, other_MR: Tensor) -> Tensor:
    """[], linear CKA by the unbiased estimator of HSIC (Song et al. 2012); about 0 for unrelated rows, where the plain form is near 1.

    At least 4 rows. The biased form must never be minimised: for independent noise of 1,536 and 3,584 channels it is 0.97 at 64 rows.
    """
    one_MM, other_MM = _without_diagonal(one_MD @ one_MD.T), _without_diagonal(other_MR @ other_MR.T)
    scale = _hsic(one_MM, one_MM) * _hsic(other_MM, other_MM)
    return _hsic(one_MM, other_MM) * torch.rsqrt(scale.clamp_min(torch.finfo(scale.dtype).tiny ** 0.5))


def _without_diagonal(kernel_MM: Tensor) -> Tensor:
    """Scaled to a largest entry of about 1 (CKA knows no scale), so that products stay within float32."""
    kernel_MM = kernel_MM - torch.diag(kernel_MM.diagonal())
    return kernel_MM / kernel_MM.detach().abs().max().clamp_min(1e-30)


def _hsic(one_MM: Tensor, other_MM: Tensor) -> Tensor:
    rows = len(one_MM)
    ones = one_MM.sum() * other_MM.sum() / ((rows - 1) * (rows - 2))
    return ((one_MM * other_MM).sum() + ones - 2 / (rows - 2) * (one_MM.sum(0) @ other_MM.sum(1))) / (rows * (rows - 3))


def cka(student_MD: Tensor, target_MR: Tensor) -> Tensor:
    """[], 1 - debiased linear CKA."""
    return 1 - debiased_cka(student_MD, target_MR)


def rkd(student_MD: Tensor, target_MR: Tensor) -> Tensor:
    """[], relational distances (Park et al. 2019): Huber between the distances of rows, each model's divided by their mean."""
    ours, theirs = _distances(student_MD), _distances(target_MR)
    return functional.smooth_l1_loss(ours, theirs, beta=1.0)


def _distances(state_MD: Tensor) -> Tensor:
    """[M (M - 1) / 2]."""
    distance = functional.pdist(state_MD)
    return distance / distance.mean().clamp_min(1e-12)
