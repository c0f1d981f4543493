"""Muon (Jordan et al. 2024) in float32: the teacher's optimizer of matrices.

torch's own orthogonalises in bfloat16. A CPU without AVX-512 emulates that dtype, and the demo's teacher took 17 minutes there.
In: matrices with gradients; out: the same matrices, one step further.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315  # the quintic of https://kellerjordan.github.io/posts/muon/
_ITERATIONS = 5
_EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose updates are orthogonalised, with decoupled weight decay.

    Args:
        matrices: the parameters, each of two axes.
        lr: of a square matrix; one with more rows than columns takes sqrt(rows / columns) times as much.
        weight_decay: per step, times `lr`.
        momentum: of the running mean of gradients.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._move(matrix, group["lr"], group["weight_decay"], group["momentum"])

    def _move(self, matrix: Tensor, lr: float, weight_decay: float, momentum: float) -> None:
        state = self.state[matrix]
        if not state:
            state["mean"] = torch.zeros_like(matrix)
        mean = state["mean"].lerp_(matrix.grad, 1 - momentum)
        rows, columns = matrix.shape
        matrix.mul_(1 - lr * weight_decay)
        update = orthogonal(matrix.grad.lerp(mean, momentum))
        matrix.add_(update, alpha=-lr * math.sqrt(max(1, rows / columns)))


def orthogonal(matrix_RC: Tensor) -> Tensor:
    """The nearest orthogonal matrix, roughly: five Newton-Schulz steps bring the singular values to about 0.7 to 1.2."""
    rows, columns = matrix_RC.shape
    wide = matrix_RC.T if rows > columns else matrix_RC  # the Gram matrix is of the shorter side
    wide = wide / wide.norm().clamp(min=_EPSILON)
    for _ in range(_ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), wide, beta=_A)
    return wide.T if rows > columns else wide
