"""What the three terms on features have in common: a weight that may fall to 0, pairs of blocks, figures per block.

In: losses per row of each pair; out: their mean over the pairs, weighted and divided by the normalizer (docs/concepts/method.md 1.5), and what the log
says of it. Rows that a term leaves out (sinks, short contexts) count for nothing above and stay in the normalizer below.

Axes: N supervised rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.features.layers import LayerPair
from student_trainer.losses.term import Mean, StudentOutputs, SupervisedRows, TeacherLabels, TermResult
from student_trainer.schedules import Schedule

# Rows before it are sinks in most models: massive activations that teach nothing (docs/concepts/method.md 4.2).
FIRST_POSITION = 4


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


class PairedTerm(ABC):
    """The half of a `LossTerm` that is the same for all objectives on pairs of blocks; the other half is `_pair`."""

    name: ClassVar[str]
    teacher: str = ""  # whose layers these are, in a run with several teachers
    _pairs: tuple[LayerPair, ...]
    _weight: FeatureWeight

    @abstractmethod
    def _pair(self, pair: LayerPair, outputs: StudentOutputs, labels: TeacherLabels, rows: SupervisedRows) -> PairLoss:
        """Of one pair in a micro-batch."""

    def term(
        self,
        outputs: StudentOutputs,
        labels: TeacherLabels | None,
        rows: SupervisedRows,
        normalizer: float | Tensor,
        step: int,
    ) -> TermResult:
        """The term and its figures: `NAME_loss`, the mean over pairs, and `NAME_loss_S` of the student's block S; neither times the weight.

        At weight 0 it is still measured, without a gradient. Where its teacher, one of several, has not answered, everything is 0.
        """
        if labels is None:
            return self._unanswered(outputs)
        weight = self._weight.at(step)
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            losses = [self._pair(pair, outputs, labels, rows) for pair in self._pairs]
        total = torch.stack([found.sum for found in losses]).sum() / len(losses)
        counted = torch.stack([found.weights.detach().double() for found in losses]).mean()
        figures = {f"{self.name}_loss": Mean(total.detach().double(), counted)}
        for pair, found in zip(self._pairs, losses, strict=True):
            sums = found.sum.detach().double(), found.weights.detach().double()
            figures[f"{self.name}_loss_{pair.student}"] = Mean(*sums)
        return TermResult(weight * total / normalizer, figures)

    def _unanswered(self, outputs: StudentOutputs) -> TermResult:
        """Nothing to learn, and figures of no rows: a log has the same in every micro-batch."""
        nothing = torch.zeros((), dtype=torch.float64, device=outputs.final_BLD.device)
        names = [f"{self.name}_loss", *(f"{self.name}_loss_{pair.student}" for pair in self._pairs)]
        return TermResult(outputs.final_BLD.sum() * 0.0, {name: Mean(nothing, nothing) for name in names})
