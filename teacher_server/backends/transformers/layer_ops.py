"""The steps of a decoder layer between its matrix products, in plain torch; `kernels.py` has the fast versions.

In: activations [T, ...] in the model's dtype; out: the same. Rounded where transformers rounds.
Axes: T packed tokens, D width, F ffn width, R rotated heads, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from teacher_server.backends.transformers import kernels


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, *, float8: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x + residual, and its RMS norm: norm_TD, sum_TD, and with `float8` a scale a row."""
    sum_TD = x_TD if residual_TD is None else x_TD + residual_TD
    wide_TD = sum_TD.float()
    wide_TD = wide_TD * torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + eps)
    norm_TD = weight_D * wide_TD.to(x_TD.dtype)
    if not float8:
        return norm_TD, sum_TD, None
    norm_TD, scale_T1 = to_float8(norm_TD)
    return norm_TD, sum_TD, scale_T1


def rotate(x_TRd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> None:
    """Rotary position embedding of the first R heads of every row, in place."""
    half = x_TRd.shape[-1] // 2
    turned_TRd = torch.cat([-x_TRd[..., half:], x_TRd[..., :half]], dim=-1)
    x_TRd.copy_(x_TRd * cos_Td[:, None] + turned_TRd * sin_Td[:, None])


def silu_mul(gate_up_T2F: Tensor, *, float8: bool = False) -> tuple[Tensor, Tensor | None]:
    """silu(gate) * up of rows that hold both side by side, and with `float8` a scale a row."""
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    out_TF = nn.functional.silu(gate_TF) * up_TF
    return to_float8(out_TF) if float8 else (out_TF, None)


def to_float8(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as float8 e4m3 with the scale that maps a row's largest magnitude to 448."""
    wide_TD = x_TD.float()
    scale_T1 = wide_TD.abs().amax(-1, keepdim=True).clamp_min(1e-12) / torch.finfo(kernels.FLOAT8).max
    return (wide_TD / scale_T1).to(kernels.FLOAT8), scale_T1
