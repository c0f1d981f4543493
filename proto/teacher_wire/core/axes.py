"""What a tensor of an answer counts along its first axis, and where the entries of a row begin there.

In: a batch of tokens; out: numbers of entries before each wanted row, by axis. Chunks, slices and the labels of one sequence are all cut by
these counts, so that no signal brings arithmetic of its own.

Axes: N wanted rows, C checked rows, B sequences that have a wanted row, P pairs of a wanted row and a position not after it, K blocks of
positions that a wanted row sees, T tokens up to the last wanted row of their sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum

import numpy as np

from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.checked_rows import checked_rows
from teacher_wire.core.errors import LabelError


class Axis(StrEnum):
    """What one entry of a tensor is of (proto: Axis)."""

    ROW = "row"
    CHECKED = "checked"
    SEQUENCE = "sequence"
    PAIR = "pair"
    BLOCK = "block"
    TOKEN = "token"


BLOCK_POSITIONS = 64  # of one entry of the BLOCK axis
_OF_LETTER = {
    "N": Axis.ROW, "C": Axis.CHECKED, "B": Axis.SEQUENCE, "P": Axis.PAIR, "K": Axis.BLOCK, "T": Axis.TOKEN,
}  # fmt: skip


def axis_of(name: str) -> Axis:
    """The first axis of a tensor called like this: the first letter after the last underscore says it.

    Raises:
        LabelError: the name says none.
    """
    letter = name.rpartition("_")[2][:1]
    if letter not in _OF_LETTER:
        raise LabelError("a tensor's name must end in its axes", field=name, value=letter, limit="|".join(_OF_LETTER))
    return _OF_LETTER[letter]


class Entries:
    """Entries of each axis before each wanted row of a batch.

    An entry of the SEQUENCE axis belongs to the last wanted row of its sequence: it travels in the chunk that ends the sequence. An entry
    of the TOKEN axis belongs to the first wanted row of its sequence that is not before it.
    """

    def __init__(self, batch: TokenBatch) -> None:
        self._batch = batch
        self._before: dict[Axis, np.ndarray] = {}

    def before(self, axis: Axis) -> np.ndarray:
        """int64 [N+1], rising from 0: entries of the rows before row r; the last one is how many there are."""
        if axis not in self._before:
            self._before[axis] = self._count(axis)
        return self._before[axis]

    def total(self, axis: Axis) -> int:
        """Entries of all rows."""
        return self._batch.rows if axis is Axis.ROW else int(self.before(axis)[-1])

    def span(self, axis: Axis, start: int, stop: int) -> tuple[int, int]:
        """First entry of row `start`, and one behind the last entry of row `stop` - 1."""
        if axis is Axis.ROW:
            return start, stop
        before = self.before(axis)
        return int(before[start]), int(before[stop])

    @staticmethod
    def totals(batches: Sequence[TokenBatch], axes: Iterable[Axis]) -> dict[Axis, int]:
        """Entries of these axes in all batches together."""
        each = [Entries(batch) for batch in batches]
        return {axis: sum(entries.total(axis) for entries in each) for axis in axes}

    def _count(self, axis: Axis) -> np.ndarray:
        batch = self._batch
        if axis is Axis.ROW:
            return np.arange(batch.rows + 1)
        if axis is Axis.CHECKED:
            each_N = checked_rows(batch)
        elif axis is Axis.SEQUENCE:
            bounds_B1 = batch.row_bounds_B1
            each_N = np.zeros(batch.rows, np.bool_)
            each_N[bounds_B1[1:][np.diff(bounds_B1) > 0] - 1] = True
        else:
            rows_N, sequence_N = batch.rows_of(), batch.sequences_of_rows()
            each_N = rows_N - batch.cu_lengths_B1[sequence_N] + 1
            if axis is Axis.BLOCK:
                each_N = (each_N - 1) // BLOCK_POSITIONS + 1
            elif axis is Axis.TOKEN:
                follows_N = (
                    np.flatnonzero(sequence_N[1:] == sequence_N[:-1]) + 1
                )  # rows with one before them in their sequence
                each_N[follows_N] = np.diff(rows_N)[follows_N - 1]
        before = np.zeros(batch.rows + 1, np.int64)
        np.cumsum(each_N, out=before[1:])
        return before
