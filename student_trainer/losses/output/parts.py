"""Which rows of each of several teachers are held against which of the student's, and the chunks that these are looked at in.

In: shares and places of a micro-batch, on the host; out: indices on the student's device. Nothing here waits for the device.
Must never see a logit.

Axes: N supervised rows, M of them kept (of weight above 0), P of these that a teacher has a distribution of, R rows of a teacher,
G groups of tokens that are compared as a whole, F rows of all of them, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from student_trainer.errors import DataError
from student_trainer.losses.cross_tokenizer.bridge import Bridge
from student_trainer.losses.rows import TeacherRows
from student_trainer.losses.term import JoinedLabels, TeacherShare

_TOGETHER = (
    16  # bytes, at multiples of which tensors of one transfer begin; a kernel is compiled again where they do not
)
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}  # that losses are computed in


@dataclass(frozen=True, eq=False)
class Joining:
    """How several teachers are joined; constant over a run.

    Attributes:
        teachers: their names, in the order of the log; also of those that have not answered about a micro-batch.
        bridged: those of them with another tokenizer.
        combine: `loss_sum`, `prob_mix`, `route` or `confidence` (docs/concepts/method.md 9). `route` is a sum of one.
    """

    teachers: tuple[str, ...]
    bridged: frozenset[str] = frozenset()
    combine: str = "loss_sum"

    @classmethod
    def of(cls, labels: JoinedLabels) -> Joining:
        """The sum of those that have answered."""
        bridged = frozenset(name for name, share in labels.by_name.items() if share.bridge is not None)
        return cls(tuple(labels.by_name), bridged)


@dataclass(frozen=True, eq=False)
class Index:
    """Row numbers, on the host and, sent there when that is first asked for, on the device."""

    host_P: np.ndarray
    device: torch.device
    is_rising: bool

    @classmethod
    def of(cls, host_P: np.ndarray, device: torch.device) -> Index:
        return cls(host_P, device, bool((np.diff(host_P) > 0).all()))

    @cached_property
    def device_P(self) -> Tensor:
        return on_device(torch.from_numpy(self.host_P), self.device)

    def __len__(self) -> int:
        return len(self.host_P)

    def part(self, start: int, stop: int, origin: int = 0) -> slice | Tensor:
        """Some of them, counted from `origin`; neighbours as a slice, which is no copy and no launch."""
        first, last = int(self.host_P[start]), int(self.host_P[stop - 1])
        if self.is_rising and last - first == stop - start - 1:
            return slice(first - origin, last + 1 - origin)
        return self.device_P[start:stop] - origin if origin else self.device_P[start:stop]


@dataclass(frozen=True, eq=False)
class LongGroups:
    """Groups of tokens that are not one against one, in the order of the text (docs/concepts/method.md 8.4).

    Attributes:
        first_G: on the host, the first of each group's rows among the M kept ones.
        student: all their rows among the M kept ones, group by group; those of group g begin at `student_start_G1[g]`, on the host.
        teacher: all their rows among the teacher's; likewise.
        student_row_F, student_begin_G1, teacher_begin_G1: the same on the device.
        weight_G: sum over its rows of weight times share, in the dtype of the losses.
    """

    first_G: np.ndarray
    student: Index
    student_start_G1: np.ndarray
    teacher: Index
    teacher_start_G1: np.ndarray
    student_row_F: Tensor
    student_begin_G1: Tensor
    teacher_begin_G1: Tensor
    weight_G: Tensor

    @classmethod
    def of(
        cls,
        student_G2: np.ndarray,
        teacher_G2: np.ndarray,
        weight_M: np.ndarray,
        device: torch.device,
        dtype: torch.dtype,
    ) -> LongGroups:
        """From half-open ranges among the M kept rows and the teacher's; `weight_M` is float64, weight times share."""
        student_F, start_G1 = _flat(student_G2)
        teacher_F, teacher_start_G1 = _flat(teacher_G2)
        before_M1 = np.concatenate([[0.0], np.cumsum(weight_M)])
        weight_G = before_M1[student_G2[:, 1]] - before_M1[student_G2[:, 0]]
        there = on_device_together([student_F, start_G1, teacher_start_G1, weight_G.astype(_NUMPY[dtype])], device)
        return cls(
            first_G=student_G2[:, 0],
            student=Index.of(student_F, device),
            student_start_G1=start_G1,
            teacher=Index.of(teacher_F, device),
            teacher_start_G1=teacher_start_G1,
            student_row_F=there[0],
            student_begin_G1=there[1],
            teacher_begin_G1=there[2],
            weight_G=there[3],
        )

    @cached_property
    def tokens_G(self) -> Tensor:
        """float64, of the student."""
        return on_device(torch.from_numpy(np.diff(self.student_start_G1).astype(np.float64)), self.weight_G.device)

    @cached_property
    def student_group_F(self) -> Tensor:
        """int64, the group of each of the student's rows."""
        group_F = np.repeat(np.arange(len(self)), np.diff(self.student_start_G1))
        return on_device(torch.from_numpy(group_F), self.weight_G.device)

    def __len__(self) -> int:
        return len(self.first_G)


def _flat(ranges_G2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64, the numbers in half-open ranges one behind another; and [G+1] where those of each begin."""
    sizes_G = ranges_G2[:, 1] - ranges_G2[:, 0]
    start_G1 = np.concatenate([[0], np.cumsum(sizes_G)])
    return np.arange(start_G1[-1]) + np.repeat(ranges_G2[:, 0] - start_G1[:-1], sizes_G), start_G1


@dataclass(frozen=True, eq=False)
class TeacherPart:
    """One teacher in a micro-batch.

    Attributes:
        name: in the config.
        rows: the teacher's.
        host_labels_R: int64, on the host, the tokens that its rows describe, in its ids.
        place: [P] among the M kept rows, rising: those that it has a distribution of.
        row: [P] of the teacher, likewise.
        weight_P: weight times share, in the dtype of the losses.
        host_weight_P: float64, on the host, the weights alone.
        share_M: float32, on the host, of all kept rows, those among them that it has no distribution of.
        covered: weight of the kept rows that have its labels, by either way of comparison.
        compared: of those among them that are compared row by row.
        bridge: to another tokenizer; None for the student's.
        groups: that are compared as a whole; None for the student's tokenizer.
    """

    name: str
    rows: TeacherRows
    host_labels_R: np.ndarray
    place: Index
    row: Index
    weight_P: Tensor
    host_weight_P: np.ndarray
    share_M: np.ndarray
    covered: float
    compared: float
    bridge: Bridge | None = None
    groups: LongGroups | None = None

    @cached_property
    def labels_R(self) -> Tensor:
        """int64, `host_labels_R` on the device."""
        return on_device(torch.from_numpy(self.host_labels_R), self.weight_P.device)

    @cached_property
    def own_weight_P(self) -> Tensor:
        """float64, `host_weight_P` on the device."""
        return on_device(torch.from_numpy(self.host_weight_P), self.weight_P.device)

    @cached_property
    def log_share_P(self) -> Tensor:
        """In the dtype of the losses."""
        log_share_P = np.log(self.share_M[self.place.host_P].astype(np.float64))
        return on_device(torch.from_numpy(log_share_P).to(self.weight_P.dtype), self.weight_P.device)


@dataclass(frozen=True, eq=False)
class Kept:
    """The rows of a micro-batch that count, on the host.

    Attributes:
        row_M: int64, which of the N rows.
        weight_M: float64, above 0.
        labels_N: int64, of all rows.
    """

    row_M: np.ndarray
    weight_M: np.ndarray
    labels_N: Tensor


def part_of(name: str, share: TeacherShare, kept: Kept, device: torch.device, dtype: torch.dtype) -> TeacherPart:
    """What of a teacher's answer is used.

    Raises:
        DataError: lengths, places or groups that do not fit; a share of rows that the teacher has not described.
    """
    rows = share.labels.output
    assert rows is not None, "a teacher that is joined was asked for its distributions"
    shares_N = share.share_N.numpy()
    if len(shares_N) != kept.labels_N.numel():
        raise DataError(f"teacher {name!r}: {len(shares_N)} shares for {kept.labels_N.numel()} student states")
    share_M = shares_N[kept.row_M]
    if share.bridge is not None:
        return _bridged(name, rows, share.bridge, share_M, kept, device, dtype)
    row_N = _row_of(name, share, rows.lse_N.numel(), kept.labels_N.numel())
    row_M = row_N[kept.row_M]
    lost_M = (share_M > 0) & (row_M < 0)
    if lost_M.any():
        raise DataError(
            f"teacher {name!r} has a share of row {int(kept.row_M[lost_M.argmax()])}, of which it has sent none"
        )
    labels_R = kept.labels_N if share.row_M is None else kept.labels_N[torch.from_numpy(share.row_M)]
    place_P = np.flatnonzero(share_M > 0)
    return _part(name, rows, labels_R, place_P, row_M[place_P], share_M, kept, device, dtype)


def _part(
    name: str,
    rows: TeacherRows,
    labels_R: Tensor,
    place_P: np.ndarray,
    row_P: np.ndarray,
    share_M: np.ndarray,
    kept: Kept,
    device: torch.device,
    dtype: torch.dtype,
) -> TeacherPart:
    weight_P = kept.weight_M[place_P]
    return TeacherPart(
        name=name,
        rows=rows,
        host_labels_R=labels_R.numpy(),
        place=Index.of(place_P, device),
        row=Index.of(row_P, device),
        weight_P=on_device(torch.from_numpy(weight_P * share_M[place_P]).to(dtype), device),
        host_weight_P=weight_P,
        share_M=share_M,
        covered=float(weight_P.sum()),
        compared=float(weight_P.sum()),
    )


def _bridged(
    name: str,
    rows: TeacherRows,
    bridge: Bridge,
    share_M: np.ndarray,
    kept: Kept,
    device: torch.device,
    dtype: torch.dtype,
) -> TeacherPart:
    """A teacher with another tokenizer. A group of which a row has no weight or no share is left out as a whole."""
    count, labels_R = rows.lse_N.numel(), bridge.labels_M
    student_G2, teacher_G2 = bridge.groups.student_G2, bridge.groups.teacher_G2
    if labels_R.numel() != count:
        raise DataError(f"teacher {name!r}: {count} rows, and tokens of {labels_R.numel()}")
    _check_ranges(name, "student", student_G2, len(kept.labels_N))
    _check_ranges(name, "teacher", teacher_G2, count)
    ids = bridge.classes.teacher_Vt.numel()
    if count and not 0 <= int(labels_R.min()) <= int(labels_R.max()) < ids:
        raise DataError(f"teacher {name!r}: a token of its rows lies outside 0..{ids - 1}, its ids")
    place_N = np.full(len(kept.labels_N) + 1, -1)
    place_N[kept.row_M[share_M > 0]] = np.flatnonzero(share_M > 0)
    before_N1 = np.concatenate([[0], np.cumsum(place_N[:-1] >= 0)])
    whole_G = before_N1[student_G2[:, 1]] - before_N1[student_G2[:, 0]] == student_G2[:, 1] - student_G2[:, 0]
    one_G = whole_G & ((student_G2[:, 1] - student_G2[:, 0]) == 1) & ((teacher_G2[:, 1] - teacher_G2[:, 0]) == 1)
    place_P = place_N[student_G2[one_G, 0]]
    part = _part(name, rows, labels_R, place_P, teacher_G2[one_G, 0], share_M, kept, device, dtype)
    long_G = whole_G & ~one_G
    first_G = place_N[student_G2[long_G, 0]]
    span_G2 = np.stack([first_G, first_G + student_G2[long_G, 1] - student_G2[long_G, 0]], 1)
    groups = LongGroups.of(span_G2, teacher_G2[long_G], kept.weight_M * share_M, device, dtype)
    covered = part.covered + float(kept.weight_M[groups.student.host_P].sum())
    return replace(part, bridge=bridge, groups=groups, covered=covered)


def _check_ranges(name: str, side: str, ranges_G2: np.ndarray, rows: int) -> None:
    """Refuses groups that are empty, fall, overlap or lie outside."""
    flat = ranges_G2.reshape(-1)
    rising = (ranges_G2[:, 1] > ranges_G2[:, 0]).all() and (ranges_G2[1:, 0] >= ranges_G2[:-1, 1]).all()
    if flat.size and not (rising and flat[0] >= 0 and flat[-1] <= rows):
        raise DataError(f"teacher {name!r}: groups of the {side}'s rows must rise within 0..{rows}, without overlap")


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


def chunk_bounds(count: int, chunk_rows: int, groups: Sequence[LongGroups]) -> list[int]:
    """Where chunks of M rows begin, and M at the end: at most `chunk_rows` rows each, unless one group has more; no group lies in two."""
    is_border_M1 = np.ones(count + 1, np.bool_)
    for of_teacher in groups:
        inside_F = np.ones(len(of_teacher.student), np.bool_)
        inside_F[of_teacher.student_start_G1[:-1]] = False
        is_border_M1[of_teacher.student.host_P[inside_F]] = False
    borders = np.flatnonzero(is_border_M1)
    bounds = [0]
    while bounds[-1] < count:
        at = int(np.searchsorted(borders, bounds[-1] + chunk_rows, side="right")) - 1
        if borders[at] <= bounds[-1]:
            at += 1  # the group that begins here is longer than a chunk
        bounds.append(int(borders[at]))
    return bounds


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """From the host to `device`, on its way when this returns."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def on_device_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Likewise of several arrays of one axis, in one transfer: a GPU's driver takes as long for a few numbers as for a thousand."""
    if device.type != "cuda":
        return [torch.from_numpy(array) for array in arrays]
    host = torch.empty(packed_bytes(arrays), dtype=torch.uint8, pin_memory=True)
    pack(arrays, host.numpy())
    return unpacked(arrays, host.to(device, non_blocking=True))


def packed_bytes(arrays: Sequence[np.ndarray]) -> int:
    """That several arrays take, each filled up so that the next begins where kernels like a matrix to begin."""
    return sum(array.nbytes + _filler(array) for array in arrays)


def pack(arrays: Sequence[np.ndarray], into: np.ndarray) -> None:
    """Writes several arrays of one axis into one of bytes, in the order of `_packing`."""
    parts = [into[:0]]
    for at in _packing(arrays):
        parts += [np.ascontiguousarray(arrays[at]).view(np.uint8), np.zeros(_filler(arrays[at]), np.uint8)]
    np.concatenate(parts, out=into)


def unpacked(arrays: Sequence[np.ndarray], there: Tensor) -> list[Tensor]:
    """Tensors like `arrays` that share memory with `there`, in which they are packed."""
    found: dict[int, Tensor] = {}
    start = 0
    for dtype, same in groupby(_packing(arrays), key=lambda at: arrays[at].dtype):
        which = list(same)
        sizes = [size for at in which for size in (arrays[at].size, _filler(arrays[at]) // dtype.itemsize)]
        stop = start + sum(sizes) * dtype.itemsize
        pieces = there[start:stop].view(torch.from_numpy(np.empty(0, dtype)).dtype).split(sizes)
        found |= dict(zip(which, pieces[::2], strict=True))
        start = stop
    return [found[at] for at in range(len(arrays))]


def _filler(array: np.ndarray) -> int:
    """Bytes."""
    return -array.nbytes % _TOGETHER


def _packing(arrays: Sequence[np.ndarray]) -> list[int]:
    """Those of one kind one behind another."""
    return sorted(range(len(arrays)), key=lambda at: arrays[at].dtype.str)
