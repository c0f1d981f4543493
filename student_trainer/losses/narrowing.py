"""What one of several teachers has answered, and what of the student's micro-batch it is about: for terms that learn from one alone.

In: the outputs, labels and rows of a micro-batch; out: those of the sequences that the teacher was asked about.

Axes: B sequences, L padded length, N supervised rows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.term import JoinedLabels, StudentOutputs, SupervisedRows, TeacherLabels, TeacherShare


def narrowed(
    teacher: str | None, outputs: StudentOutputs, labels: JoinedLabels, rows: SupervisedRows
) -> tuple[StudentOutputs, TeacherLabels | None, SupervisedRows]:
    """The arguments of `LossTerm.term` for a term that learns from one teacher.

    Args:
        teacher: its name; None for the first that has answered and shares the student's tokenizer, which suits figures alone.
    Returns:
        Everything as it is and no labels if that teacher has not answered.
    """
    share = _share(teacher, labels)
    if share is None:
        return outputs, None, rows
    assert share.bridge is None, "layers of a teacher with another tokenizer are refused before"
    if share.sequences is None:
        return outputs, share.labels, rows
    outputs, rows = _of_sequences(share.sequences, outputs, rows)
    return outputs, share.labels, rows


def _share(teacher: str | None, labels: JoinedLabels) -> TeacherShare | None:
    if teacher is not None:
        assert teacher, "a term of a run with several teachers names its own"
        return labels.by_name.get(teacher)
    return next((share for share in labels.by_name.values() if share.bridge is None), None)


def _of_sequences(
    sequences: tuple[int, ...], outputs: StudentOutputs, rows: SupervisedRows
) -> tuple[StudentOutputs, SupervisedRows]:
    """Some sequences of a micro-batch, and their rows, numbered anew."""
    assert rows.sequence_N is not None and rows.position_N is not None, (
        "rows of a run with several teachers know their places"
    )
    sequence_b = np.asarray(sequences, np.int64)
    kept_n = np.flatnonzero(np.isin(rows.sequence_N, sequence_b))
    place_n = np.searchsorted(sequence_b, rows.sequence_N[kept_n])
    position_n = rows.position_N[kept_n]
    device, length = outputs.final_BLD.device, outputs.final_BLD.shape[1]
    at_b = _on(torch.from_numpy(sequence_b), device)
    host_n = torch.from_numpy(kept_n)
    sampled_N = rows.sampled_logp_N
    return (
        StudentOutputs(outputs.final_BLD[at_b], {tap: there[at_b] for tap, there in outputs.taps.items()}),
        replace(
            rows,
            index_N=_on(torch.from_numpy(place_n * length + position_n), device),
            labels_N=rows.labels_N[host_n],
            weights_N=rows.weights_N[host_n],
            position_N=position_n,
            sequence_N=place_n,
            sampled_logp_N=None if sampled_N is None else sampled_N[host_n],
        ),
    )


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    """From the host to `device`, on its way when this returns."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
