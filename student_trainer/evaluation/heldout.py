"""How good a student is on held-out data: NLL per byte, KL to the teacher, acc1, acc3.

In: a student, rows, and the teacher's labels if there is a teacher; out: figures. No gradients, no sampling. Labels are held
against the teacher's head as in training, before anything is said that rests on them.
Axes: N supervised rows of a batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from student_trainer.data.batch_plan import by_length
from student_trainer.data.dataset import TokenizedDataset, collate
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.packing import pack_own
from student_trainer.labels.rows_on_device import rows_on
from student_trainer.losses.align import row_index
from student_trainer.losses.cross_tokenizer.bridge import Bridge
from student_trainer.losses.cross_tokenizer.measure import measure_bridged
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import Tally, TeacherHeadMismatch
from student_trainer.losses.measure import measure as measure_rows
from student_trainer.model.load import Student


@dataclass(frozen=True, eq=False)
class Answered:
    """What one of several teachers has answered about a batch of held-out rows.

    Attributes:
        labels: its answer.
        row_M: which rows of the batch it describes; None for all in order, and for another tokenizer.
        bridge: to another tokenizer; None for the student's.
        names: of the sequences that it was asked about.
    """

    labels: LabelTensors
    row_M: np.ndarray | None
    bridge: Bridge | None
    names: tuple[str, ...]


class Unanswered(Exception):  # noqa: N818
    """A teacher that need not be waited for does not answer: its figure is left out."""


@dataclass(frozen=True, eq=False)
class OneTeacher:
    """One of several teachers.

    Attributes:
        name: its figure is `kl_to_NAME`.
        head: for `hidden` labels.
        answered: number of a batch of `by_length(data, batch_size)` -> its answer; None where it was asked nothing. Raises Unanswered.
    """

    name: str
    head: Head | None
    answered: Callable[[int], Answered | None]
    tally: Tally = field(default_factory=Tally)


@torch.no_grad()
def measure(
    student: Student,
    data: TokenizedDataset,
    batch_size: int,
    vocab_rows: int,
    *,
    labels: Callable[[int], LabelTensors] | None = None,
    teacher_head: Head | None = None,
    several: Sequence[OneTeacher] = (),
    chunk_bytes: int = 256 << 20,
) -> dict[str, float]:
    """Figures over all of `data`.

    Args:
        student: in evaluation mode.
        data: held-out rows.
        batch_size: sequences per forward pass.
        vocab_rows: V, ids that student and teacher share.
        labels: number of a batch of `by_length(data, batch_size)` -> the teacher's answer; None without a teacher.
        teacher_head: for `hidden` labels.
        several: teachers that are asked about some of the rows each, in place of `labels`.
        chunk_bytes: bound on logits held at a time.

    Returns:
        `nll_per_byte` (nats per UTF-8 byte of the supervised text; not if that is empty), `nll_per_token`, `acc1`, `acc3` (share of rows whose
        token is the first, among the first three) and, with a teacher, `kl_to_teacher` (nats a row, KL(teacher || student); not from `top_k` labels, which
        only bound it), `teacher_nll_per_byte`, `teacher_acc1` and `teacher_acc3`; with `several` of each `kl_to_NAME` over its own rows (of one with
        another tokenizer between classes of ids, over rows that are one to one), without those that do not answer and need not.

    Raises:
        TeacherHeadMismatch: labels are not what the teacher's head makes of its states; names the sample.
    """
    tally = Tally()
    sums: dict[str, float] = {}
    silent: set[str] = set()
    head = student.head(vocab_rows)
    device = head.weight_VD.device
    for number, indices in enumerate(by_length(data, batch_size)):
        rows = [data[index] for index in indices]
        padded = collate(rows, student.pad_id)
        packed = pack_own([row.example for row in rows])
        index_N = torch.from_numpy(row_index(packed.cu_lengths_B1, packed.wanted_T, padded["input_ids"].shape[1])).to(
            device
        )
        state_BLD = student.states(padded["input_ids"].to(device))
        state_ND = state_BLD.reshape(-1, state_BLD.shape[-1])[index_N]
        labels_N = torch.from_numpy(packed.labels_N()).long().to(device)
        teacher = None if labels is None else rows_on(labels(number), teacher_head, device)
        found = measure_rows(state_ND, head, teacher, labels_N, chunk_rows=max(16, chunk_bytes // (16 * vocab_rows)))
        if found.integrity is not None:
            try:
                found.integrity.check(tally)
            except TeacherHeadMismatch as error:
                error.add_note(f"held-out sample {rows[packed.sequence_of_row(error.row)].example.key}")
                raise
        for name in (
            "nll_sum",
            "kl_sum",
            "acc1_hits",
            "acc3_hits",
            "teacher_nll_sum",
            "teacher_acc1_hits",
            "teacher_acc3_hits",
            "rows",
        ):
            value = getattr(found, name)
            if value is not None:
                sums[name] = sums.get(name, 0.0) + float(value)
        for one in several:
            if one.name in silent:
                continue
            try:
                counts = _of_teacher(one, number, state_ND, head, labels_N, chunk_bytes)
            except Unanswered:
                silent.add(one.name)
                continue
            for name, count in counts.items():
                sums[name] = sums.get(name, 0.0) + count
    rows_seen = sums["rows"]
    figures = {"nll_per_byte": sums["nll_sum"] / data.target_bytes} if data.target_bytes else {}
    figures |= {
        "nll_per_token": sums["nll_sum"] / rows_seen,
        "acc1": sums["acc1_hits"] / rows_seen,
        "acc3": sums["acc3_hits"] / rows_seen,
    }
    if "teacher_nll_sum" in sums and data.target_bytes:
        figures["teacher_nll_per_byte"] = sums["teacher_nll_sum"] / data.target_bytes
    if "kl_sum" in sums:
        figures["kl_to_teacher"] = sums["kl_sum"] / rows_seen
        figures["teacher_acc1"] = sums["teacher_acc1_hits"] / rows_seen
        figures["teacher_acc3"] = sums["teacher_acc3_hits"] / rows_seen
    for one in several:
        if one.name in silent:  # what it has said of some of its rows is no figure of all
            continue
        if compared := sums.get(f"rows of {one.name}"):
            figures[f"kl_to_{one.name}"] = sums[f"kl of {one.name}"] / compared
    return figures


def _of_teacher(
    one: OneTeacher, number: int, state_ND: Tensor, head: Head, labels_N: Tensor, chunk_bytes: int
) -> dict[str, float]:
    """The sum of a teacher's KL over its rows of a batch, and their number; nothing where it was asked nothing or cannot say.

    Raises:
        TeacherHeadMismatch: as `measure`.
    """
    answered = one.answered(number)
    if answered is None:
        return {}
    device = state_ND.device
    teacher = rows_on(answered.labels, one.head, device)
    chunk_rows = max(16, chunk_bytes // (16 * head.vocab_rows))
    if answered.bridge is not None:
        bridged = measure_bridged(state_ND, head, teacher, answered.bridge, chunk_rows=chunk_rows)
        integrity, kl_sum, rows = bridged.integrity, bridged.kl_sum, bridged.compared
    else:
        if answered.row_M is not None:
            row_M = torch.from_numpy(answered.row_M).to(device)
            state_ND, labels_N = state_ND[row_M], labels_N[row_M]
        found = measure_rows(state_ND, head, teacher, labels_N, chunk_rows=chunk_rows)
        integrity, kl_sum, rows = found.integrity, found.kl_sum, found.rows
    if integrity is not None:
        try:
            integrity.check(one.tally)
        except TeacherHeadMismatch as error:
            error.add_note(f"held-out samples {', '.join(answered.names[:4])} of teacher {one.name}")
            raise
    return {} if kl_sum is None else {f"kl of {one.name}": float(kl_sum), f"rows of {one.name}": float(rows)}
