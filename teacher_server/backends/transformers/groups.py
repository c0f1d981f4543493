"""The jobs of a batch that ask for the same, and where a batch is cut that captures more than the device should hold: policy, without torch.

In: jobs in their order; out: groups with what each asks of its rows, neighbours among the batch's sequences; slices of those.
Axes: B sequences of the batch, R rows at hand, M named ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.checked_rows import checked_rows
from teacher_wire.core.signals import SignalSpec

Job = tuple[TokenBatch, SignalSpec]
Members = list[tuple[SignalSpec, list[int]]]  # of each group, places in the batch


def sequences_of(batch: TokenBatch) -> list[np.ndarray]:
    """The ids of each sequence."""
    return np.split(batch.token_ids_T, batch.cu_lengths_B1[1:-1])


def wanted_of(batch: TokenBatch) -> list[np.ndarray]:
    """The flags of each sequence."""
    return np.split(batch.wanted_T, batch.cu_lengths_B1[1:-1])


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of rows, on the host; see `signals.base.Rows`."""

    labels_R: np.ndarray
    extra_RM: np.ndarray | None
    sequence_R: np.ndarray | None = None
    kept_R: np.ndarray | None = None
    checked_R: np.ndarray | None = None

    def part(self, rows: slice) -> Asked:
        """The same of a slice of them."""

        def own(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[rows]

        named = (self.extra_RM, self.sequence_R, self.kept_R, self.checked_R)
        return Asked(self.labels_R[rows], *(own(array) for array in named))


@dataclass(frozen=True, eq=False)
class Group:
    """Jobs of one spec.

    Attributes:
        spec: theirs.
        members: their places in the batch.
        first: of the batch's sequences in the order of groups, the group's first.
        cu_rows: wanted rows of the group before each of its sequences, and in all.
        asked: of all its rows.
    """

    spec: SignalSpec
    members: list[int]
    first: int
    cu_rows: np.ndarray
    asked: Asked

    @property
    def last(self) -> int:
        """Behind its last sequence."""
        return self.first + len(self.cu_rows) - 1

    def within(self, cut: slice) -> tuple[slice, slice]:
        """Which sequences of a cut of the batch are the group's, counted from the cut's first, and which of its rows they have."""
        start, stop = (min(max(at, self.first), self.last) for at in (cut.start, cut.stop))
        rows = slice(int(self.cu_rows[start - self.first]), int(self.cu_rows[stop - self.first]))
        return slice(start - cut.start, stop - cut.start), rows


def members_of(jobs: list[Job], *, apart: bool) -> Members:
    """Which jobs are reduced together: all of one spec, or with `apart` each by itself, so that the first is done before the last."""
    if apart:
        return [(spec, [index]) for index, (_, spec) in enumerate(jobs)]
    found: dict[SignalSpec, list[int]] = {}
    for index, (_, spec) in enumerate(jobs):
        found.setdefault(spec, []).append(index)
    return list(found.items())


def groups_of(jobs: list[Job], members: Members) -> list[Group]:
    """The groups, one behind the other."""
    made, first = [], 0
    for spec, indices in members:
        batches = [jobs[index][0] for index in indices]
        rows_B = [int(wanted.sum()) for batch in batches for wanted in wanted_of(batch)]
        extra = [batch.extra_ids_NM for batch in batches if batch.extra_ids_NM is not None]
        asked = Asked(
            labels_R=np.concatenate([batch.labels_N() for batch in batches]),
            extra_RM=np.concatenate(extra) if extra else None,
            sequence_R=np.concatenate([batch.sequences_of_rows() + (1 << 32) * i for i, batch in enumerate(batches)]),
            checked_R=np.concatenate([checked_rows(batch) for batch in batches]) if spec.check == "sampled" else None,
        )
        made.append(Group(spec, indices, first, np.concatenate([[0], np.cumsum(rows_B)]), asked))
        first += len(rows_B)
    return made


def cuts_of(sequences: Sequence[np.ndarray], token_bytes: int, limit_bytes: int) -> Iterator[slice]:
    """Neighbours whose captured values fit the device together; all, if nothing is captured. A longer sequence goes by itself."""
    start, held = 0, 0
    for end, ids in enumerate(sequences):
        if end > start and held + len(ids) * token_bytes > limit_bytes:
            yield slice(start, end)
            start, held = end, 0
        held += len(ids) * token_bytes
    yield slice(start, len(sequences))
