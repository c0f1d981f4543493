"""Which rows of each of several teachers are held against which of the student's, and the chunks that these are looked at in.

In: shares and places of a micro-batch, on the host; out: indices on the student's device. Nothing here waits for the device.
Must never see a logit.

Axes: N supervised rows, M of them kept (of weight above 0), P of these that a teacher has a distribution of, R rows of a teacher,
G groups of tokens that are compared as a whole, S and T the most tokens of one on either side, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from student_trainer.errors import DataError
from student_trainer.losses.rows import TeacherRows
from student_trainer.losses.term import TeacherShare


@dataclass(frozen=True, eq=False)
class Joining:
    """How several teachers are joined; constant over a run.

    Attributes:
        teachers: their names, in the order of the log; also of those that have not answered about a micro-batch.
        bridged: those of them with another tokenizer.
        combine: `loss_sum`, `prob_mix`, `route` or `confidence` (algorithms.md 9).
    """

    teachers: tuple[str, ...]
    bridged: frozenset[str] = frozenset()
    combine: str = "loss_sum"


@dataclass(frozen=True, eq=False)
class Index:
    """Row numbers, on the host and on the device."""

    host_P: np.ndarray
    device_P: Tensor

    @classmethod
    def of(cls, host_P: np.ndarray, device: torch.device) -> Index:
        return cls(host_P, on_device(torch.from_numpy(host_P), device))

    def __len__(self) -> int:
        return len(self.host_P)

    def part(self, start: int, stop: int, origin: int = 0) -> slice | Tensor:
        """Some of them, counted from `origin`; neighbours as a slice, which is no copy and no launch."""
        first, last = int(self.host_P[start]), int(self.host_P[stop - 1])
        if last - first == stop - start - 1:
            return slice(first - origin, last + 1 - origin)
        return self.device_P[start:stop] - origin if origin else self.device_P[start:stop]


@dataclass(frozen=True, eq=False)
class LongGroups:
    """Groups whose tokens are not one against one, in the order of the text (algorithms.md 8.4).

    Attributes:
        first_G: on the host, the first of each group's rows among the M kept ones.
        student_GS, teacher_GT: int64, among the M kept rows and the teacher's; entries beyond a group are 0, and False in the masks.
        student_mask_GS, teacher_mask_GT: bool.
        tokens_G: of the student, in the dtype of the losses.
        weight_G: sum over its rows of weight times share, likewise.
    """

    first_G: np.ndarray
    student_GS: Tensor
    student_mask_GS: Tensor
    teacher_GT: Tensor
    teacher_mask_GT: Tensor
    tokens_G: Tensor
    weight_G: Tensor


@dataclass(frozen=True, eq=False)
class TeacherPart:
    """One teacher in a micro-batch.

    Attributes:
        name: in the config.
        share: its answer.
        rows: of `share.labels`.
        place: [P] among the M kept rows, rising.
        row: [P] of the teacher, likewise.
        weight_P: weight times share, in the dtype of the losses.
        share_M: float32, on the host, of every kept row; 0 where it has no distribution.
        covered: weight of the kept rows that have its labels, by either way of comparison.
        groups: that are compared as a whole; None for the student's tokenizer.
    """

    name: str
    share: TeacherShare
    rows: TeacherRows
    place: Index
    row: Index
    weight_P: Tensor
    share_M: np.ndarray
    covered: float
    groups: LongGroups | None = None


def part_of(
    name: str, share: TeacherShare, kept_M: np.ndarray, weights_N: np.ndarray, device: torch.device, dtype: torch.dtype
) -> TeacherPart:
    """What of a teacher's answer is used.

    Args:
        kept_M: int64, rows of weight above 0.
        weights_N: of all rows.
    Raises:
        DataError: it has a share of rows that it has not described.
    """
    rows = share.labels.output
    assert rows is not None, "a teacher that is joined was asked for its distributions"
    shares_N = share.share_N.numpy()
    if len(shares_N) != len(weights_N):
        raise DataError(f"teacher {name!r}: {len(shares_N)} shares for {len(weights_N)} student states")
    row_N = _row_of(name, share, rows.lse_N.numel(), len(weights_N))
    row_M, share_M = row_N[kept_M], shares_N[kept_M]
    lost_M = (share_M > 0) & (row_M < 0)
    if lost_M.any():
        raise DataError(
            f"teacher {name!r} has a share of row {int(kept_M[lost_M.argmax()])}, of which it has sent none"
        )
    place_P = np.flatnonzero(share_M > 0)
    weight_P = weights_N[kept_M[place_P]].astype(np.float64) * share_M[place_P]
    return TeacherPart(
        name,
        share,
        rows,
        Index.of(place_P, device),
        Index.of(row_M[place_P], device),
        on_device(torch.from_numpy(weight_P).to(dtype), device),
        share_M,
        float(weights_N[kept_M[place_P]].sum(dtype=np.float64)),
    )


def _row_of(name: str, share: TeacherShare, count: int, rows: int) -> np.ndarray:
    """int64 [N], the teacher's row of each; -1 where it has none."""
    if share.row_M is None:
        if count != rows:
            raise DataError(f"teacher {name!r}: {count} rows for {rows} student states")
        return np.arange(rows)
    if len(share.row_M) != count:
        raise DataError(f"teacher {name!r}: {count} rows, and places of {len(share.row_M)}")
    row_N = np.full(rows, -1)
    row_N[share.row_M] = np.arange(count)
    return row_N


def chunk_bounds(count: int, chunk_rows: int, groups: Sequence[LongGroups | None]) -> list[int]:
    """Where chunks of M rows begin, and M at the end: at most `chunk_rows` rows each, unless one group has more; no group lies in two."""
    return [*range(0, count, chunk_rows), count] if count else [0]


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """From the host to `device`, on its way when this returns."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
