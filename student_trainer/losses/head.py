"""An output head, the student's or the teacher's: from states after the final norm to logits.

In: states [C, D]. Out: logits [C, V] in float32 or float64, and the way of a gradient back to the raw product.
Must never be trained here: `output/` writes the gradients; a head only knows its own formula.

Axes: C rows of a chunk, V vocabulary rows, D width, R rank of an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from student_trainer.losses.matmul import project, project_transposed


@dataclass(frozen=True, eq=False)
class Lora:
    """A low-rank adapter on a head's weight: W + scaling * B A (scaling = alpha / r); no dropout."""

    a_RD: Tensor
    b_VR: Tensor
    scaling: float


@dataclass(frozen=True, eq=False)
class Head:
    """logits = softcap(logit_scale * (h W^T + scaling * (h A^T) B^T + bias)).

    Attributes:
        weight_VD: any float dtype; may require a gradient (trained or tied).
        bias_V: or None.
        logit_scale: multiplier, 1.0 for most models.
        final_softcap: 0.0 for none, else c in c * tanh(z / c).
        lora: an adapter on the weight, or None.

    Source: docs/concepts/method.md 3.1, 3.2.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    final_softcap: float = 0.0
    lora: Lora | None = None

    @property
    def vocab_rows(self) -> int:
        """V."""
        return self.weight_VD.shape[0]

    def logits(self, h_CD: Tensor, transposed: bool = False) -> Tensor:
        """Logits [C, V] at temperature 1 of states [C, D]; float64 if the states or the weight are, else float32. Not differentiable: see `pull_back_`.

        Args:
            transposed: with those of an id side by side in memory, in place of those of a row.
        """
        z_CV = project_transposed(h_CD, self.weight_VD).T if transposed else project(h_CD, self.weight_VD)
        if self.lora is not None:
            z_CV.add_(project(project(h_CD, self.lora.a_RD), self.lora.b_VR), alpha=self.lora.scaling)
        if self.bias_V is not None:
            z_CV.add_(self.bias_V)
        if self.logit_scale != 1.0:
            z_CV.mul_(self.logit_scale)
        if self.final_softcap:
            z_CV.div_(self.final_softcap).tanh_().mul_(self.final_softcap)
        return z_CV

    def pull_back_(self, grad_CV: Tensor, z_CV: Tensor) -> Tensor:
        """Turns a gradient on the logits `z_CV` into one on h W^T, in place."""
        if self.final_softcap:
            grad_CV.mul_(1 - (z_CV / self.final_softcap).square_())  # d tanh = 1 - tanh^2
        if self.logit_scale != 1.0:
            grad_CV.mul_(self.logit_scale)
        return grad_CV

    def slice(self, vocab_rows: int) -> Head:
        """The head over ids 0..vocab_rows-1, sharing memory (docs/concepts/method.md 1.6).

        Raises:
            ValueError: the head has fewer rows.
        """
        if not 1 <= vocab_rows <= self.vocab_rows:
            raise ValueError(f"vocab_rows must lie in 1..{self.vocab_rows}, the rows of the head, not {vocab_rows}")
        if vocab_rows == self.vocab_rows:
            return self
        lora = self.lora and replace(self.lora, b_VR=self.lora.b_VR[:vocab_rows])
        bias_V = None if self.bias_V is None else self.bias_V[:vocab_rows]
        return replace(self, weight_VD=self.weight_VD[:vocab_rows], bias_V=bias_V, lora=lora)

    def trained(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Weight, bias, A and B, each None unless it requires a gradient and gradients are on."""
        a_RD, b_VR = (self.lora.a_RD, self.lora.b_VR) if self.lora else (None, None)
        return if_trained(self.weight_VD), if_trained(self.bias_V), if_trained(a_RD), if_trained(b_VR)


def if_trained(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or None if it needs no gradient or gradients are off."""
    return tensor if tensor is not None and tensor.requires_grad and torch.is_grad_enabled() else None
