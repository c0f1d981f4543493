"""What a loss term is: what it needs, what it is given for a micro-batch, and what it answers.

In: the student's outputs, the teacher's labels and the supervised rows; out: one differentiable number with named parts.
Must never know of a config, a wire or an optimizer: `total.py` sums terms, `training/objective.py` makes them from a config.

Axes: B sequences, L padded length, N supervised rows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class StudentOutputs:
    """What one pass of the student gives.

    Attributes:
        final_BLD: states after the final norm, as the output head reads them.
        taps: by number, the outputs [B, L, D] of the blocks that were asked for, before any norm; 0 is the embedding, the input of
            block 1. In the dtype of the residual stream. Gradients flow through them.
    """

    final_BLD: Tensor
    taps: Mapping[int, Tensor] = field(default_factory=dict)

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them: the final states, then the taps in their order."""
        return self.final_BLD, *self.taps.values()
