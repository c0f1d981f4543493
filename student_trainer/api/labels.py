"""A padded batch as a request to the teacher, and the teacher's answer with the places in the batch that it describes.

In: token ids [B, L] and a mask of the supervised tokens; out: packed sequences for the wire, and `Labels`.
Must never shift by itself: which row describes which token is said by `losses/align.py` alone.

Axes: B sequences, L padded length, T packed tokens, N labelled rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from student_trainer.errors import DataError
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.rows_on_device import CHECKED_ROWS, rows_on
from student_trainer.labels.source import LabelRequest, LabelUsage
from student_trainer.losses.align import wanted_rows
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import Tally
from student_trainer.losses.rows import TeacherRows
from teacher_wire.core.batch import TokenBatch


@dataclass(frozen=True, eq=False)
class AskedBatch:
    """A padded batch, and what the teacher is asked about it.

    Attributes:
        request: the sequences that have a supervised token, packed, each up to its last supervised token: what stands behind it
            changes no row before it, since teachers are causal.
        shape: [B, L] of the padded batch.
        index_N: int64, where the labelled rows are in the flattened batch [B * L].
        label_ids_N: int64, the tokens that they describe.
    """

    request: LabelRequest
    shape: tuple[int, int]
    index_N: np.ndarray
    label_ids_N: np.ndarray

    @classmethod
    def of(cls, input_ids: Any, loss_mask: Any) -> AskedBatch:
        """From a right-padded batch.

        Args:
            input_ids: integers [B, L]: a tensor, an array or lists. What they are behind the last supervised token of a
                sequence does not matter.
            loss_mask: [B, L], true (or 1) at the tokens that are to be learned; such as `labels != -100`.

        Raises:
            DataError: shapes or types that do not fit, no supervised token at all, or a first token that is supervised.
        """
        ids_BL, mask_BL = _array(input_ids, "input_ids"), _array(loss_mask, "loss_mask")
        if ids_BL.ndim != 2 or not np.issubdtype(ids_BL.dtype, np.integer):
            raise DataError("must be integers [B, L]", field="input_ids", value=f"{ids_BL.dtype}{list(ids_BL.shape)}")
        if mask_BL.shape != ids_BL.shape:
            raise DataError(
                f"must have the shape of input_ids, {list(ids_BL.shape)}", field="loss_mask", value=list(mask_BL.shape)
            )
        if mask_BL.dtype != np.bool_:
            if not np.isin(mask_BL, (0, 1)).all():
                raise DataError(
                    "must be true or false (or 1 or 0) for every token, such as labels != -100",
                    field="loss_mask",
                    value=sorted(set(mask_BL.reshape(-1).tolist()))[:4],
                )
            mask_BL = mask_BL.astype(np.bool_)
        count, length = ids_BL.shape
        if mask_BL[:, :1].any():
            raise DataError(
                f"the first token of sequence {int(mask_BL[:, 0].argmax())} is supervised, which no row describes: "
                "set loss_mask[:, 0] = False (models that shift labels by themselves leave it out unsaid)",
                field="loss_mask",
            )
        if not mask_BL.any():
            raise DataError("no token of the batch is supervised: leave the batch out", field="loss_mask")
        wanted_BL = wanted_rows(mask_BL.reshape(-1), np.arange(count + 1) * length).reshape(count, length)
        index_N = np.flatnonzero(wanted_BL)
        lengths_B = np.where(mask_BL.any(1), length - mask_BL[:, ::-1].argmax(1), 0)
        asked = np.flatnonzero(lengths_B)
        cu_B1 = np.zeros(len(asked) + 1, np.int32)
        cu_B1[1:] = np.cumsum(lengths_B[asked])
        ids_T = np.concatenate([ids_BL[b, : lengths_B[b]] for b in asked]).astype(np.int32)
        wanted_T = np.concatenate([wanted_BL[b, : lengths_B[b]] for b in asked])
        batch = TokenBatch(ids_T, cu_B1, wanted_T)
        names = tuple(f"sequence {b} of the batch" for b in asked)
        return cls(LabelRequest(batch, names), (count, length), index_N, batch.labels_N().astype(np.int64))


def _array(given: Any, name: str) -> np.ndarray:
    if isinstance(given, Tensor):
        return given.detach().cpu().numpy()
    try:
        return np.asarray(given)
    except ValueError as error:  # lists of different lengths
        raise DataError("sequences must be padded to one length", field=name) from error


@dataclass(frozen=True, eq=False)
class Labels:
    """A teacher's labels of one batch, checked as far as they can be without its output head.

    Attributes:
        shape: [B, L] of the batch.
        index_N: int64 on the host, where the labelled rows are in the flattened batch: row t of a sequence describes token t+1.
        label_ids_N: int64 on the host, the tokens that they describe.
        vocab_rows: V, ids 0..V-1 that the labels are over.
        transport: "hidden", "top_k" or "full".
        usage: whether they came from the disk or cost the teacher a pass.
        tensors: as they travelled, on the host.
        head_on: the teacher's output head on a device, for `hidden`.
        tally: what integrity checks of this teacher have seen so far.
        on_mismatch: called when rows are found to be wrong; returns a sentence for the error.
    """

    shape: tuple[int, int]
    index_N: Tensor
    label_ids_N: Tensor
    vocab_rows: int
    transport: str
    usage: LabelUsage
    tensors: LabelTensors = field(repr=False)
    head_on: Callable[[torch.device], Head | None] = field(repr=False)
    tally: Tally = field(repr=False)
    on_mismatch: Callable[[], str] = field(repr=False)
    names_N: Callable[[int], str] = field(repr=False)

    def __len__(self) -> int:
        """N, how many rows are labelled."""
        return self.index_N.numel()

    def rows(self, device: torch.device | str) -> TeacherRows:
        """The labels as the losses of `student_trainer.losses` read them, on a device."""
        place = torch.device(device)
        checked = self.tensors.named.get(CHECKED_ROWS)
        return rows_on(
            self.tensors, self.head_on(place), place, checked_row=None if checked is None else checked.numpy()
        )
