"""One token per row from one uniform number per row: inverse CDF, so that sampling has no state.

In: logits and uniforms; out: ids and their log-probabilities. The same uniform and distribution give the same id on every machine
up to rounding.

Axes: B rows, V vocabulary rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw(z_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Samples from softmax(z / temperature), restricted to its nucleus of mass `top_p` (Holtzman et al. 2020).

    Args:
        z_BV: float32 logits, finite.
        uniform_B: float64 in [0, 1).
        temperature: above 0.
        top_p: in (0, 1]; 1 restricts nothing. The nucleus is the likeliest ids, ties by the lower id, up to the first with which their
            mass reaches top_p.

    Returns:
        int64 [B] ids, and float32 [B] log-probabilities under the temperature, before top_p.
    """
    logp_BV = torch.log_softmax(z_BV / temperature, dim=-1)
    p_BV = logp_BV.double().exp()  # a float32 sum over 150,000 ids is off by more than many of them have
    if top_p < 1:
        p_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
        p_BV[_running_sum(p_BV) - p_BV >= top_p] = 0.0
    cdf_BV = _running_sum(p_BV)
    total_B = cdf_BV[:, -1]
    # Below the total, however it is rounded: the id found then has a probability above 0.
    target_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    ids_B1 = torch.searchsorted(cdf_BV, target_B[:, None], right=True)
    if top_p < 1:
        ids_B1 = order_BV.gather(-1, ids_B1)
    return ids_B1[:, 0], logp_BV.gather(-1, ids_B1)[:, 0]


def _running_sum(p_BV: Tensor) -> Tensor:
    """Of each row. A GPU sums a single row by blocks that meet in any order, so that rounding would differ from call to call; of two it does not."""
    if p_BV.is_cuda and len(p_BV) == 1:
        return p_BV.expand(2, -1).cumsum(-1)[:1]
    return p_BV.cumsum(-1)
