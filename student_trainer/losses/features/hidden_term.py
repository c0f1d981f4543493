"""Hidden states of chosen blocks as a term: through a learned projector, or without one by how rows lie to one another.

In: outputs of the student's blocks, states of the teacher as they travelled; out: a differentiable number and figures per block. The
projectors are trained with the student at a higher rate, kept in checkpoints, and not exported.

Axes: N supervised rows, M of them sampled, D the student's width, R the width of the teacher's states as they travelled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from student_trainer.errors import ConfigError
from student_trainer.losses.features import states
from student_trainer.losses.features.labels import layer_states
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
from student_trainer.losses.term import Needs, StudentOutputs, SupervisedRows, TeacherLabels
from teacher_wire.core.signals import Signal

# objective -> loss per row, of a projected student
PROJECTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"proj_cos": states.proj_cos, "proj_sl1": states.proj_sl1}
# objective -> one number of a sample of rows; widths may differ
SAMPLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"gram": states.gram, "cka": states.cka, "rkd": states.rkd}


@dataclass(frozen=True, eq=False)
class Basis:
    """How a teacher's layer is cut down before it travels: massive channels set to 0, divided by its root mean square, minus the mean, projected.

    Attributes:
        mean_D: float32.
        basis_DR: orthonormal columns.
        massive_M: int64, channels.
    """

    mean_D: Tensor
    basis_DR: Tensor
    massive_M: Tensor


class Projector(nn.Module):
    """From the student's states to the teacher's as they travel: [N, D] -> [N, R].

    Without anything known it begins as an orthogonal map of the states divided by their root mean square. Where the widths are equal it
    begins as what the teacher's states went through themselves, so that a student cut from its teacher starts near the end.

    Args:
        width: D.
        target: R.
        basis: of the teacher's layer, if its states travel in one.
        teacher_width: of the teacher's states before that.
    """

    shift_D: Tensor
    kept_D: Tensor

    def __init__(self, width: int, target: int, basis: Basis | None, teacher_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, target, bias=False)
        self._same = basis if width == teacher_width else None
        if self._same is not None:
            self.linear.weight.data.copy_(self._same.basis_DR[:, :target].T)
        elif width == teacher_width == target:
            nn.init.eye_(self.linear.weight)
        else:
            nn.init.orthogonal_(self.linear.weight)
        shift_D = torch.zeros(width) if self._same is None else self._same.mean_D.float()
        kept_D = torch.ones(width)
        if self._same is not None:
            kept_D[self._same.massive_M.long()] = 0
        # Not saved: they come with the teacher's artifact, whose digest the labels are named by.
        self.register_buffer("shift_D", shift_D.clone(), persistent=False)
        self.register_buffer("kept_D", kept_D, persistent=False)

    def forward(self, state_ND: Tensor) -> Tensor:
        """[N, R], in float32 (or float64)."""
        state_ND = states.wide(state_ND)
        if self._same is not None:
            state_ND = state_ND * self.kept_D
        state_ND = states.rms_normed(state_ND)
        return self.linear(state_ND if self._same is None else state_ND - self.shift_D)


class HiddenTerm(PairedTerm, nn.Module):
    """See module.

    Args:
        objective: of PROJECTED or SAMPLED.
        pairs: of blocks; 0 is the embedding.
        weight: at a step.
        signal: that asks for the teacher's states.
        projectors: by the student's block; none for the objectives without.

    Raises:
        ConfigError: an unknown objective.
    """

    name = "hidden"

    def __init__(
        self,
        objective: str,
        pairs: tuple[LayerPair, ...],
        weight: FeatureWeight,
        signal: Signal,
        projectors: Mapping[int, Projector],
    ) -> None:
        super().__init__()
        if objective not in PROJECTED | SAMPLED:
            raise ConfigError(
                f"loss.hidden.objective={objective!r} is unknown; choose from {', '.join(PROJECTED | SAMPLED)}"
            )
        self._objective = objective
        self._pairs = pairs
        self._weight = weight
        self._signal = signal
        self.layers = nn.ModuleDict({str(block): projector for block, projector in projectors.items()})

    def needs(self) -> Needs:
        return Needs((self._signal,), tuple(pair.student for pair in self._pairs))

    def _pair(self, pair: LayerPair, outputs: StudentOutputs, labels: TeacherLabels, rows: SupervisedRows) -> PairLoss:
        target_NR = layer_states(labels.named, pair.teacher)
        state_ND = rows.of(outputs.taps[pair.student])
        weights_N = weights_beyond(rows, FIRST_POSITION, target_NR)
        if self._objective in PROJECTED:
            guess_NR = self.layers[str(pair.student)](state_ND)
            return of_rows(PROJECTED[self._objective](guess_NR, target_NR), weights_N)
        sampled_M = sample(rows)
        if len(sampled_M) < states.FEWEST_SAMPLED:
            return PairLoss(state_ND.sum() * 0.0, weights_N.sum() * 0.0)
        index_M = torch.from_numpy(sampled_M).to(target_NR.device, non_blocking=True)
        found = SAMPLED[self._objective](states.rms_normed(state_ND[index_M]), target_NR[index_M])
        return PairLoss(found * weights_N.sum(), weights_N.sum())


def sample(rows: SupervisedRows) -> np.ndarray:
    """int64 [M], at most `states.MOST_SAMPLED` of the rows that count, evenly spread over the micro-batch."""
    position_N, _ = places(rows)
    there = np.flatnonzero((position_N >= FIRST_POSITION) & (rows.weights_N.numpy() > 0))
    if len(there) <= states.MOST_SAMPLED:
        return there
    return there[np.arange(states.MOST_SAMPLED) * len(there) // states.MOST_SAMPLED]
