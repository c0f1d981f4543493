"""Where chosen blocks look as a term: pooled maps, or relations of keys and of values.

In: inputs of the student's blocks, from which queries and keys are made again with gradients; the teacher's maps, or keys and values; out: a
differentiable number and figures per block.

Axes: B sequences, L padded length, N supervised rows, P blocks of keys, T tokens of all sequences, F kv width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from student_trainer.losses.features import attention
from student_trainer.losses.features.attention import AttentionStates, RowGrid
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
        position_N, sequence_N = places(rows)
        teacher_NP = pooled_maps(labels.named, pair.teacher, position_N, self._block)
        grid = RowGrid.of(position_N, sequence_N, teacher_NP.device)
        kl_N, enough_N = attention.pooled_kl(attention.pooled_logp(states, grid, self._block), teacher_NP)
        return of_rows(kl_N, weights_beyond(rows, attention.FIRST_ROW, teacher_NP) * enough_N)

    def _relations(
        self, pair: LayerPair, states: AttentionStates, labels: TeacherLabels, rows: SupervisedRows
    ) -> PairLoss:
        position_N, sequence_N = places(rows)
        theirs = keys_and_values(labels.named, pair.teacher)
        grid = RowGrid.of(position_N, sequence_N, theirs[0].device)
        ours = (states.plain_key_BLGd.flatten(-2), states.value_BLGd.flatten(-2))
        heads = attention.relation_heads(ours[0].shape[-1], theirs[0].shape[-1])
        everywhere = len(grid.sequence_S) == len(ours[0])  # a slice needs no sum of gradients by index
        which_S = slice(None) if everywhere else grid.sequence_S
        kl_N = [
            attention.relation_kl(
                x_BLF[which_S, : grid.tokens], pad_sequence(teacher_TF.split(grid.tokens_S), batch_first=True), grid, heads
            )
            for x_BLF, teacher_TF in zip(ours, theirs, strict=True)
        ]  # fmt: skip
        return of_rows((kl_N[0] + kl_N[1]) / 2, weights_beyond(rows, attention.SINKS, theirs[0]))
