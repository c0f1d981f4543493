"""What a loss term is: what it needs, what it is given for a micro-batch, and what it answers.

In: the student's outputs, the teacher's labels and the supervised rows; out: one differentiable number with named parts.
Must never know of a config, a wire or an optimizer: `total.py` sums terms, `training/objective.py` makes them from a config.

Axes: B sequences, L padded length, N supervised rows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from student_trainer.losses.cross_tokenizer.bridge import Bridge
from student_trainer.losses.integrity import Integrity
from student_trainer.losses.rows import TeacherRows
from teacher_wire.core.signals import Signal


@dataclass(frozen=True, order=True)
class FfnTap:
    """How much the FFN of a block works: [B, L, 1], the energy of what enters its `down_proj` (`features.ffn.energy`), float32.

    Attributes:
        block: from 1.
        quantiles: [B, L, 17], the profile (`features.ffn.profile`) behind the energy.
    """

    block: int
    quantiles: bool = False


Tap = int | FfnTap  # a number taps the output of a block


def block_of(tap: Tap) -> int:
    """Its block; 0 for the embedding."""
    return tap if isinstance(tap, int) else tap.block


@dataclass(frozen=True, eq=False)
class StudentOutputs:
    """What one pass of the student gives.

    Attributes:
        final_BLD: states after the final norm, as the output head reads them.
        taps: what was asked for. By number the outputs [B, L, D] of blocks, before any norm; 0 is the embedding, the input of
            block 1. In the dtype of the residual stream. By `FfnTap` as it says. Gradients flow through them.
    """

    final_BLD: Tensor
    taps: Mapping[Tap, Tensor] = field(default_factory=dict)

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them: the final states, then the taps in their order."""
        return self.final_BLD, *self.taps.values()


@dataclass(frozen=True, eq=False)
class TeacherLabels:
    """A teacher's answer about a micro-batch, on the student's device.

    Attributes:
        output: its rows over the vocabulary, as the output losses read them; None where none were asked for.
        named: every tensor of the answer by its name on the wire, such as "hidden_ND".
    """

    output: TeacherRows | None
    named: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class TeacherShare:
    """The answer of one of several teachers about a micro-batch, and what of it counts.

    Attributes:
        labels: the answer; of the sequences that it was asked about alone.
        share_N: float32, on the host: its share of the loss of each of the N supervised rows; 0 where it was not asked or did not answer.
            The shares of a row sum to 1, or to 0 where no teacher has answered.
        sequences: which of the B sequences the answer is about, rising; None for all.
        row_M: int64, on the host: which of the N rows each of its M rows describes; None if they are all N in order, and for
            another tokenizer.
        bridge: to a teacher with another tokenizer, whose M rows are its own; None for the same tokenizer.
    """

    labels: TeacherLabels
    share_N: Tensor
    sequences: tuple[int, ...] | None = None
    row_M: np.ndarray | None = None
    bridge: Bridge | None = None


@dataclass(frozen=True, eq=False)
class JoinedLabels:
    """What several teachers have answered about a micro-batch; `by_name` has those that have, by their names in the config."""

    by_name: Mapping[str, TeacherShare]


@dataclass(frozen=True, eq=False)
class SupervisedRows:
    """The rows of a padded micro-batch that describe a supervised token, in the order of the teacher's.

    Attributes:
        index_N: int64, on the student's device: where they are in the flattened batch [B * L].
        labels_N: int64, on the host: the tokens they describe.
        weights_N: float32, on the host: of their losses, at least 0.
        position_N, sequence_N: int64, on the host: where they are in their sequence, and which of the B it is; None where no term asks.
        sampled_logp_N: float32, on the host: log-probability of each label under the weights and temperature that sampled it; NaN in
            rows of the data. None where no sequence is a rollout.
    """

    index_N: Tensor
    labels_N: Tensor
    weights_N: Tensor
    position_N: np.ndarray | None = None
    sequence_N: np.ndarray | None = None
    sampled_logp_N: Tensor | None = None

    def of(self, states_BLD: Tensor) -> Tensor:
        """[N, D], these rows of the student's states."""
        return states_BLD.reshape(-1, states_BLD.shape[-1])[self.index_N]


@dataclass(frozen=True)
class Needs:
    """What must be there before a term can be computed.

    Attributes:
        signals: of the teacher, as requests ask for them.
        taps: of the student's blocks, as in `StudentOutputs.taps`.
    """

    signals: tuple[Signal, ...] = ()
    taps: tuple[Tap, ...] = ()


@dataclass(frozen=True, eq=False)
class Mean:
    """A figure of the log, whose sums over micro-batches and steps are divided when it is written.

    Attributes:
        sum: [], float64, detached, on the student's device.
        over: [], likewise: what the sum is divided by, such as the weights of its rows.
    """

    sum: Tensor
    over: Tensor


@dataclass(frozen=True, eq=False)
class TermResult:
    """What a term answers about a micro-batch.

    Attributes:
        total: [], with a graph: its share of the loss, weighted and divided by the normalizer.
        parts: figures by their name in the log.
        evidence: that the teacher's rows are of these tokens and its head; of several teachers one each. None if the term has looked at none.
    """

    total: Tensor
    parts: Mapping[str, Mean]
    evidence: Integrity | tuple[Integrity, ...] | None = None


class LossTerm(Protocol):
    """One summand of the loss. A term that is an nn.Module has its parameters trained and checkpointed with the student (projectors)."""

    @property
    def name(self) -> str:
        """Of its section in `loss`; errors and the files of its parameters say it."""

    def needs(self) -> Needs:
        """Constant over a run."""

    def term(
        self,
        outputs: StudentOutputs,
        labels: TeacherLabels | None,
        rows: SupervisedRows,
        normalizer: float | Tensor,
        step: int,
    ) -> TermResult:
        """The term of one micro-batch.

        Args:
            outputs: of the student, with the taps that all terms need.
            labels: the teacher's; None in a run without one, or where this term's teacher, one of several, has not answered.
            rows: which of the flattened states are supervised.
            normalizer: Z of the whole accumulation window over all ranks (docs/concepts/method.md 1.5).
            step: of the optimizer, counted from 0; schedules are functions of it.
        """


@runtime_checkable
class JoiningTerm(Protocol):
    """A term that learns from all teachers of a run at once; others are given the labels of the one that they name."""

    def joined(
        self,
        outputs: StudentOutputs,
        labels: JoinedLabels,
        rows: SupervisedRows,
        normalizer: float | Tensor,
        step: int,
    ) -> TermResult:
        """As `LossTerm.term`."""
