"""How active a feed-forward block is at each row: its figures, and the input of its last product where experts make it.

In: u, what `down_proj` multiplies, in the model's dtype; out: the figures of `FfnActivation`, float32.
Axes: X computed slots, R rows at hand, F ffn width, D model width, K experts of a row, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from teacher_server.backends.transformers.capture import sorting_kernel
from teacher_server.signals.captured import QUANTILES

_FLOOR = 1e-6
_SORTED_ROWS = 512  # at a time: 512 x 18,944 channels are 39 MB, sorting holds three such


def energy(u_RF: Tensor, scale_R1: Tensor | None = None) -> Tensor:
    """log(norm(u) / sqrt(F) + 1e-6), float32 [R]."""
    if scale_R1 is None:
        norm_R = torch.linalg.vector_norm(u_RF, dim=-1, dtype=torch.float32)
    else:
        parts = [torch.linalg.vector_norm(part.float(), dim=-1) for part in u_RF.split(_SORTED_ROWS)]
        norm_R = torch.cat(parts) * scale_R1[:, 0]
    return torch.log(norm_R * u_RF.shape[-1] ** -0.5 + _FLOOR)


def sorted_means(u_RF: Tensor) -> Tensor:
    """Means of the sixteen parts of |u| / sum |u|, sorted from the largest; float32 [R, 16].

    Part i holds the places i F // 16 to (i + 1) F // 16 of F, and one at least.
    """
    if sorting_kernel.usable(u_RF):
        return sorting_kernel.sorted_means(u_RF, QUANTILES)
    width = u_RF.shape[-1]
    bounds = [(i * width // QUANTILES, (i + 1) * width // QUANTILES) for i in range(QUANTILES)]
    made = []
    for part in u_RF.split(_SORTED_ROWS):
        size_CF = (
            part.bfloat16() if part.element_size() == 1 else part
        ).abs()  # a radix sort of 16 bits costs half of one of 32
        size_CF = size_CF.sort(dim=-1, descending=True).values.float()
        means = [size_CF[:, start : max(stop, start + 1)].mean(-1) for start, stop in bounds]
        made.append(torch.stack(means, dim=-1) / size_CF.sum(-1, keepdim=True).clamp_min(1e-30))
    return torch.cat(made)


def has_routed_sum(experts: Any) -> bool:
    """Whether `routed_sum` knows these experts: gated ones of transformers' common shape, without biases."""
    shape = [getattr(experts, name, None) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated")]
    return shape == [True, False, False, True]


def routed_sum(experts: Any, x_RD: Tensor, expert_RK: Tensor, weight_RK: Tensor) -> Tensor:
    """The sum over the experts of each row of their weight times their input of the last product; float32 [R, F].

    transformers' experts keep it inside one grouped product, so it is computed a second time, for these rows alone.
    """
    rows, kept = expert_RK.shape
    order_S = expert_RK.flatten().argsort(stable=True)
    counts_E = expert_RK.flatten().bincount(minlength=experts.num_experts).tolist()
    sum_RF = None
    start = 0
    for number, count in enumerate(counts_E[: experts.num_experts]):
        chosen_S, start = order_S[start : start + count], start + count
        if not count:
            continue
        row_S = chosen_S // kept
        u_SF = experts._apply_gate(nn.functional.linear(x_RD.index_select(0, row_S), experts.gate_up_proj[number]))
        u_SF = u_SF.float() * weight_RK.flatten().index_select(0, chosen_S).float()[:, None]
        if sum_RF is None:
            sum_RF = u_SF.new_zeros(rows, u_SF.shape[1])
        sum_RF.index_add_(0, row_S, u_SF)  # a row is there once for an expert, so the order of sums is fixed
    return x_RD.new_zeros(rows, 1, dtype=torch.float32) if sum_RF is None else sum_RF
