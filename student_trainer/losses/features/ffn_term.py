"""How much the FFN of chosen blocks works at each token as a term: correlation of energies per sequence, or sorted quantiles.

In: energies of the student and of the teacher; out: a differentiable number and figures per block. Experimental and weak (docs/concepts/method.md 6).

Axes: N supervised rows, B sequences, Q quantiles.
"""

from __future__ import annotations

import numpy as np
import torch

from student_trainer.losses.features import ffn
from student_trainer.losses.features.labels import energies, profiles
from student_trainer.losses.features.layers import LayerPair
from student_trainer.losses.features.term import (
    FIRST_POSITION,
    FeatureWeight,
    PairedTerm,
    PairLoss,
    of_rows,
    places,
    weights_beyond,
)
from student_trainer.losses.term import FfnTap, Needs, StudentOutputs, SupervisedRows, TeacherLabels
from teacher_wire.core.signals import Signal

OBJECTIVES = ("energy", "quantiles")


class FfnTerm(PairedTerm):
    """See module.

    Args:
        objective: of OBJECTIVES.
        pairs: of blocks from 1.
        weight: at a step.
        signal: that asks for the teacher's figures.
    """

    name = "ffn"

    def __init__(self, objective: str, pairs: tuple[LayerPair, ...], weight: FeatureWeight, signal: Signal) -> None:
        assert objective in OBJECTIVES
        self._quantiles = objective == "quantiles"
        self._pairs = pairs
        self._weight = weight
        self._signal = signal

    def needs(self) -> Needs:
        return Needs((self._signal,), tuple(FfnTap(pair.student, self._quantiles) for pair in self._pairs))

    def _pair(self, pair: LayerPair, outputs: StudentOutputs, labels: TeacherLabels, rows: SupervisedRows) -> PairLoss:
        """`energy`: 1 - correlation, of sequences with at least `ffn.FEWEST_ROWS` rows. `quantiles`: sum of absolute differences."""
        found_NX = rows.of(outputs.taps[FfnTap(pair.student, self._quantiles)])
        weights_N = weights_beyond(rows, FIRST_POSITION, found_NX)
        if self._quantiles:
            return of_rows(ffn.quantile_distance(found_NX[:, 1:], profiles(labels.named, pair.teacher)), weights_N)
        position_N, sequence_N = places(rows)
        counted_N = (position_N >= FIRST_POSITION) & (rows.weights_N.numpy() > 0)
        count_B = np.bincount(sequence_N[counted_N], minlength=int(sequence_N[-1]) + 1)
        enough_N = torch.from_numpy(count_B[sequence_N] >= ffn.FEWEST_ROWS)
        weights_N = weights_N * enough_N.to(found_NX.device, non_blocking=True)
        on_device_N = torch.from_numpy(sequence_N).to(found_NX.device, non_blocking=True)
        teacher_N = energies(labels.named, pair.teacher).to(found_NX.dtype)
        loss_B = ffn.uncorrelated(found_NX[:, 0], teacher_N, weights_N, on_device_N, len(count_B))
        return of_rows(loss_B[on_device_N], weights_N)
