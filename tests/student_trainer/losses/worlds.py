"""A small student and a small teacher over the same rows, in float64, for the loss tests.

In: a seed. Out: states, heads, labels and the teacher's rows in any form. Must never use the code under test to
compute what the teacher serves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.features.attention import RowGrid
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import FLOAT32, Tolerance
from student_trainer.losses.rows import FullRows, HiddenRows, TopKRows

torch.set_num_threads(1)


@dataclass(frozen=True)
class World:
    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_hidden_ND: Tensor
    teacher_weight_VD: Tensor
    labels_N: Tensor

    @property
    def teacher_logits_NV(self) -> Tensor:
        return self.teacher_hidden_ND @ self.teacher_weight_VD.T

    def served(self) -> tuple[Tensor, Tensor]:
        """lse_N and label_logp_N."""
        logits = self.teacher_logits_NV
        return logits.logsumexp(-1), logits.log_softmax(-1).gather(-1, self.labels_N[:, None])[:, 0]

    def hidden_rows(self, tolerance: Tolerance = FLOAT32) -> HiddenRows:
        return HiddenRows(self.teacher_hidden_ND, Head(self.teacher_weight_VD), *self.served(), tolerance)

    def full_rows(self) -> FullRows:
        return FullRows(self.teacher_logits_NV, *self.served(), FLOAT32)

    def topk_rows(self, k: int) -> TopKRows:
        logits, (lse, label_logp) = self.teacher_logits_NV, self.served()
        values, ids = logits.sort(-1, descending=True)
        tail = values[:, k:].logsumexp(-1) - lse if k < logits.shape[1] else torch.full_like(lse, -torch.inf)
        return TopKRows(ids[:, :k], values[:, :k], tail, lse, label_logp, FLOAT32)


def world(rows: int = 40, vocab: int = 23, width: int = 6, seed: int = 0, spread: float = 1.0) -> World:
    """Random states and heads; `spread` widens the logits."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return World(
        normal(rows, width),
        normal(vocab, width) * spread,
        normal(rows, width + 2),
        normal(vocab, width + 2) * spread,
        torch.randint(vocab, (rows,), generator=g),
    )


def grid_of(rows_R: Tensor, sequence: int) -> RowGrid:
    """Rows of one sequence, rising, as a term on attention takes them."""
    position_R = rows_R.cpu().numpy()
    return RowGrid.of(position_R, np.full(len(position_R), sequence), rows_R.device)
