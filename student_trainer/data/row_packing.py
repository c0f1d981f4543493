"""Short sequences in shared rows: where each of a micro-batch stands, a pure function of their lengths.

In: lengths in the order of the request; out: a row and a first position for each, and for every place of the rows which sequence it is
of and where in it. Micro-batches, labels and their order stay what they are: only how the student reads them is decided here.

Axes: B sequences, R rows, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class RowPacking:
    """See module.

    Attributes:
        row_B, start_B: int64, of each sequence its row and the place of its first token there.
        sequence_RL: int64; of each place the number of its sequence within the row, from 0; what is behind the last has a number of its own.
        position_RL: int64; of each place its position within its sequence.
    """

    row_B: np.ndarray
    start_B: np.ndarray
    sequence_RL: np.ndarray
    position_RL: np.ndarray

    def of_rows(self, rows: np.ndarray) -> RowPacking:
        """Of some rows alone, in this order; it says nothing of where sequences begin."""
        nothing = np.zeros(0, np.int64)
        return RowPacking(nothing, nothing, self.sequence_RL[rows], self.position_RL[rows])


def pack_rows(lengths: Sequence[int], padded_length: Callable[[int], int] = lambda longest: longest) -> RowPacking:
    """The longest first, each into the first row that has room for it (first fit decreasing); rows are as long as the longest sequence.

    Longer rows would cost more than they save: attention looks at the square of a row's length, though sequences in it see nothing of one another.

    Args:
        lengths: tokens of each sequence, at least one.
        padded_length: L for a longest sequence of so many tokens; not less.
    """
    length = padded_length(max(lengths))
    used: list[int] = []
    row_B, start_B = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    for sequence in sorted(range(len(lengths)), key=lambda b: (-lengths[b], b)):
        row = next((r for r, tokens in enumerate(used) if tokens + lengths[sequence] <= length), len(used))
        if row == len(used):
            used.append(0)
        row_B[sequence], start_B[sequence] = row, used[row]
        used[row] += lengths[sequence]
    sequence_RL, position_RL = np.zeros((len(used), length), np.int64), np.zeros((len(used), length), np.int64)
    count_R = np.zeros(len(used), np.int64)
    for sequence in sorted(range(len(lengths)), key=lambda b: int(start_B[b])):
        row, place = row_B[sequence], slice(start_B[sequence], start_B[sequence] + lengths[sequence])
        sequence_RL[row, place], position_RL[row, place] = count_R[row], np.arange(lengths[sequence])
        count_R[row] += 1
    for row, tokens in enumerate(used):
        sequence_RL[row, tokens:], position_RL[row, tokens:] = count_R[row], np.arange(length - tokens)
    return RowPacking(row_B, start_B, sequence_RL, position_RL)
