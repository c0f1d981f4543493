"""What the three terms on features have in common: a weight that may fall to 0, pairs of blocks, figures per block.

In: losses per row of each pair; out: their mean over the pairs, weighted and divided by the normalizer (algorithms.md 1.5), and what the log
says of it. Rows that a term leaves out (sinks, short contexts) count for nothing above and stay in the normalizer below.

Axes: N supervised rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.features.layers import LayerPair
from student_trainer.losses.term import Mean, SupervisedRows, TermResult
from student_trainer.schedules import Schedule

FIRST_POSITION = (
    4  # rows before it are sinks in most models: massive activations that teach nothing (algorithms.md 4.2)
)


@dataclass(frozen=True)
class FeatureWeight:
    """The weight of a term at a step: constant, or falling to 0 as half a cosine.

    Attributes:
        start: at step 0, above 0.
        steps: optimizer steps until 0; 0 if it stays.
    """

    start: float
    steps: int = 0

    def at(self, step: int) -> float:
        """The weight during optimizer step `step`, counted from 0; a pure function of it."""
        return Schedule("cosine", self.start, 0.0, self.steps).at(step) if self.steps else self.start


@dataclass(frozen=True, eq=False)
class PairLoss:
    """Of one pair of blocks in a micro-batch.

    Attributes:
        sum: [], of the losses of rows, each times its weight, with a graph.
        weights: [], of the rows that count.
    """

    sum: Tensor
    weights: Tensor


def of_rows(loss_N: Tensor, weights_N: Tensor) -> PairLoss:
    """A loss of one row each; rows of weight 0 count for nothing, whatever their loss is."""
    counted_N = torch.where(weights_N > 0, loss_N, 0)
    return PairLoss((counted_N * weights_N).sum(), weights_N.sum())


def places(rows: SupervisedRows) -> tuple[np.ndarray, np.ndarray]:
    """Position and sequence of each row, on the host."""
    assert rows.position_N is not None and rows.sequence_N is not None, "rows of a run with features know their places"
    return rows.position_N, rows.sequence_N


def weights_beyond(rows: SupervisedRows, first: int, like: Tensor) -> Tensor:
    """[N], the weights of the rows from position `first` on, 0 before, as `like` is."""
    position_N, _ = places(rows)
    kept_N = rows.weights_N * torch.from_numpy(position_N >= first)
    return kept_N.to(device=like.device, dtype=like.dtype, non_blocking=True)


def result(
    name: str,
    pairs: Sequence[LayerPair],
    losses: Mapping[LayerPair, PairLoss],
    weight: float,
    normalizer: float | Tensor,
) -> TermResult:
    """The term and its figures: `NAME_loss`, the mean over pairs, and `NAME_loss_S` of the student's block S; neither times the weight."""
    total = torch.stack([losses[pair].sum for pair in pairs]).sum() / len(pairs)
    figures = {f"{name}_loss": Mean(total.detach().double(), _mean([losses[pair].weights for pair in pairs]))}
    for pair in pairs:
        found = losses[pair]
        figures[f"{name}_loss_{pair.student}"] = Mean(found.sum.detach().double(), found.weights.detach().double())
    return TermResult(weight * total / normalizer, figures)


def _mean(weights: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight.detach().double() for weight in weights]).mean()
