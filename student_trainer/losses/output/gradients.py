"""Gradients that are computed in the forward pass, chunk by chunk, and handed to autograd with the loss.

In: gradients on h W^T of each chunk. Out: a loss that carries them to the states, the head and its adapter.

Axes: N rows, C rows of a chunk, V vocabulary rows, D width, R rank.
Source: docs/concepts/method.md 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student_trainer.losses.head import Head
from student_trainer.losses.matmul import add_outer, project, project_back


@dataclass(frozen=True, eq=False)
class Gradients:
    """Sums in the wide dtype, zero at first; None for what is not trained. Written once a row, summed over chunks."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    a_RD: Tensor | None
    b_VR: Tensor | None

    def all(self) -> tuple[Tensor | None, ...]:
        return self.hidden_ND, self.weight_VD, self.bias_V, self.a_RD, self.b_VR

    def add(self, grad_CV: Tensor, h_CD: Tensor, index_C: Tensor | slice, head: Head) -> None:
        """Adds a chunk's share; `grad_CV` is on h W^T (docs/concepts/method.md 3.2). Rows beyond those of the index are made up: 0."""
        lora = head.lora
        if self.weight_VD is not None:
            add_outer(self.weight_VD, grad_CV, h_CD)
        if self.bias_V is not None:
            self.bias_V.add_(grad_CV.sum(0))
        if self.hidden_ND is not None:
            rows = slice(index_C.stop - index_C.start if isinstance(index_C, slice) else len(index_C))
            self.hidden_ND[index_C] = project_back(grad_CV, head.weight_VD)[rows]
        if lora is None or (self.hidden_ND is None and self.a_RD is None and self.b_VR is None):
            return
        if self.b_VR is not None:
            add_outer(self.b_VR, grad_CV, lora.scaling * project(h_CD, lora.a_RD))
        grad_CR = lora.scaling * project_back(grad_CV, lora.b_VR)
        if self.a_RD is not None:
            add_outer(self.a_RD, grad_CR, h_CD)
        if self.hidden_ND is not None:
            self.hidden_ND[index_C] += project_back(grad_CR, lora.a_RD)[rows]


class Attach(torch.autograd.Function):
    """Gives a number the gradients that were computed along with it."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *gradients_and_inputs: Tensor | None) -> Tensor:
        half = len(gradients_and_inputs) // 2
        ctx.save_for_backward(*gradients_and_inputs[:half])
        ctx.dtypes = [None if t is None else t.dtype for t in gradients_and_inputs[half:]]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        # Scaled before it is narrowed: a loss scaler exists because float16 cannot hold the unscaled ones.
        scaled = [None if sum_ is None else _scaled(sum_, grad_out, dtype) for sum_, dtype in saved]
        return (None, *(None for _ in scaled), *scaled)


def _scaled(wide_sum: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in `dtype`, without a wide copy in between."""
    return torch.mul(wide_sum, factor, out=torch.empty_like(wide_sum, dtype=dtype))
