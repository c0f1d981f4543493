"""Where chosen blocks look as a term: pooled maps, or relations of keys and of values.

In: inputs of the student's blocks, from which queries and keys are made again with gradients; the teacher's maps, or keys and values; out: a
differentiable number and figures per block.

Axes: B sequences, L padded length, N supervised rows, R of one sequence, P blocks of keys, T tokens, F kv width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.features import attention
from student_trainer.losses.features.attention import AttentionStates
from student_trainer.losses.features.labels import keys_and_values, pooled_maps
from student_trainer.losses.features.layers import LayerPair
from student_trainer.losses.features.term import (
    FeatureWeight,
    PairedTerm,
    PairLoss,
    of_rows,
    places,
    weights_beyond,
)
from student_trainer.losses.term import Needs, StudentOutputs, SupervisedRows, TeacherLabels
from teacher_wire.core.signals import Signal

OBJECTIVES = ("pooled_kl", "relation")
# number of a block from 1, the states [B, L, D] that it reads -> what its attention is computed of
Reader = Callable[[int, Tensor], AttentionStates]


class AttentionTerm(PairedTerm):
    """See module.

    Args:
        objective: of OBJECTIVES.
        pairs: of blocks from 1.
        weight: at a step.
        signal: that asks for the teacher's maps, or keys and values.
        read: makes queries and keys again (`model.attention_reader`).
        block: keys pooled into one entry, of `pooled_kl`.
    """

    name = "attention"

    def __init__(
        self,
        objective: str,
        pairs: tuple[LayerPair, ...],
        weight: FeatureWeight,
        signal: Signal,
        read: Reader,
        block: int = 64,
    ) -> None:
        assert objective in OBJECTIVES
        self._objective = objective
        self._pairs = pairs
        self._weight = weight
        self._signal = signal
        self._read = read
        self._block = block

    def needs(self) -> Needs:
        """A block's attention is made again from what the block reads, the output of the one before."""
        return Needs((self._signal,), tuple(pair.student - 1 for pair in self._pairs))

    def _pair(self, pair: LayerPair, outputs: StudentOutputs, labels: TeacherLabels, rows: SupervisedRows) -> PairLoss:
        """Nats per row: `pooled_kl` of rows from position 64 on whose teacher looks elsewhere than at the sinks, `relation` of all from the fifth on."""
        states = self._read(pair.student, outputs.taps[pair.student - 1])
        of_pair = self._pooled if self._objective == "pooled_kl" else self._relations
        return of_pair(pair, states, labels, rows)

    def _pooled(
        self, pair: LayerPair, states: AttentionStates, labels: TeacherLabels, rows: SupervisedRows
    ) -> PairLoss:
        position_N, _ = places(rows)
        teacher_NP = pooled_maps(labels.named, pair.teacher, position_N, self._block)
        parts, enough = [], []
        for sequence, start, stop, position_R in _sequences(rows, teacher_NP.device):
            tokens = int(position_N[stop - 1]) + 1
            logp_RP = attention.pooled_logp(states, sequence, position_R, tokens, self._block)
            kl_R, enough_R = attention.pooled_kl(logp_RP, teacher_NP[start:stop, : logp_RP.shape[1]])
            parts.append(kl_R)
            enough.append(enough_R)
        weights_N = weights_beyond(rows, attention.FIRST_ROW, teacher_NP) * torch.cat(enough)
        return of_rows(torch.cat(parts), weights_N)

    def _relations(
        self, pair: LayerPair, states: AttentionStates, labels: TeacherLabels, rows: SupervisedRows
    ) -> PairLoss:
        position_N, _ = places(rows)
        key_TF, value_TF = keys_and_values(labels.named, pair.teacher)
        ours = (states.plain_key_BLGd.flatten(-2), states.value_BLGd.flatten(-2))
        heads = attention.relation_heads(ours[0].shape[-1], key_TF.shape[-1])
        parts, first = [], 0
        for sequence, _, stop, position_R in _sequences(rows, key_TF.device):
            last = int(position_N[stop - 1]) + 1
            kl_R = [
                attention.relation_kl(x_BLF[sequence, :last], teacher_TF[first : first + last], position_R, heads)
                for x_BLF, teacher_TF in zip(ours, (key_TF, value_TF), strict=True)
            ]
            parts.append((kl_R[0] + kl_R[1]) / 2)
            first += last
        return of_rows(torch.cat(parts), weights_beyond(rows, attention.SINKS, key_TF))


def _sequences(rows: SupervisedRows, device: torch.device) -> Iterator[tuple[int, int, int, Tensor]]:
    """Sequence, first row, one behind the last, positions on the device: of each sequence with rows, in order; positions rise."""
    position_N, sequence_N = places(rows)
    bounds = [0, *(np.flatnonzero(np.diff(sequence_N)) + 1).tolist(), len(sequence_N)]
    position_on_device_N = torch.from_numpy(position_N).to(device, non_blocking=True)
    for start, stop in pairwise(bounds):
        yield int(sequence_N[start]), start, stop, position_on_device_N[start:stop]
