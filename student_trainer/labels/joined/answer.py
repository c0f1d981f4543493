"""What several teachers are asked about a micro-batch, and what they have answered; who counts how much.

Axes: B sequences of the micro-batch, N supervised rows of the student in it, M rows of one teacher's answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.source import LabelRequest
from student_trainer.losses.cross_tokenizer.bridge import Groups

LEAST_SHARE = 0.3  # of a sample's whole weight, that those who have answered must have (docs/concepts/method.md 9)
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class AskedOne:
    """What one teacher is asked.

    Attributes:
        sequences: which of the B, rising.
        request: about them alone, in this order, as this teacher reads them.
        row_M: int64, which of the N rows each of its rows describes; None if they are all N in order, and for another tokenizer.
        groups: of rows of both sides, for a teacher with another tokenizer; None for the student's.
    """

    sequences: tuple[int, ...]
    request: LabelRequest
    row_M: np.ndarray | None = None
    groups: Groups | None = None


@dataclass(frozen=True)
class AskedAll:
    """What is asked about one micro-batch.

    Attributes:
        names: of its B sequences.
        by_name: of each teacher that is responsible for any of them; one that is for none is not there.
    """

    names: tuple[str, ...]
    by_name: Mapping[str, AskedOne]


@dataclass(frozen=True)
class Answer:
    """What one teacher was asked, and its answer to that."""

    asked: AskedOne
    labels: LabelTensors

    @property
    def sequences(self) -> tuple[int, ...]:
        """Which of the B it is about, rising."""
        return self.asked.sequences


@dataclass(frozen=True)
class JoinedAnswer:
    """What all have answered about one micro-batch.

    Attributes:
        names: of its B sequences.
        by_name: the answers of those that were asked and were there.
        missing: of each that was asked and was away the sequences that it was asked about.
    """

    names: tuple[str, ...]
    by_name: Mapping[str, Answer]
    missing: Mapping[str, tuple[int, ...]]

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the answers take."""
        return sum(answer.labels.nbytes for answer in self.by_name.values())

    def labelled_by(self, sequence: int) -> tuple[str, ...]:
        """Who has labelled it."""
        return tuple(name for name, answer in self.by_name.items() if sequence in answer.sequences)

    def missed_by(self, sequence: int) -> tuple[str, ...]:
        """Who was to label it and was away."""
        return tuple(name for name, sequences in self.missing.items() if sequence in sequences)


def is_enough(
    asked: Mapping[str, AskedOne], answered: Iterable[str], away: Iterable[str], weights: Mapping[str, float]
) -> bool:
    """Whether those that have answered have enough weight in every sample that somebody who is away was asked about."""
    there = set(answered)
    for sequence in {b for name in away for b in asked[name].sequences}:
        responsible = [name for name, one in asked.items() if sequence in one.sequences]
        whole = sum(weights[name] for name in responsible)
        if sum(weights[name] for name in responsible if name in there) < (LEAST_SHARE - _ROUNDING) * whole:
            return False
    return True


def shares(
    weights: Mapping[str, float], sequences: Mapping[str, tuple[int, ...]], count: int
) -> dict[str, list[float]]:
    """[B] of each teacher: its share of each of `count` sequences; they sum to 1 where anybody has answered, else to 0.

    Args:
        weights: of the teachers, at least of those that have answered.
        sequences: which of them each has answered about.
    """
    whole = [0.0] * count
    for name, answered in sequences.items():
        for b in answered:
            whole[b] += weights[name]
    found = {name: [0.0] * count for name in sequences}
    for name, answered in sequences.items():
        for b in answered:
            found[name][b] = weights[name] / whole[b]
    return found
