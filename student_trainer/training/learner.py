"""What is trained: the student, what the loss terms train beside it, and the way from a micro-batch to its loss.

In: a padded micro-batch with its labels; out: a `Total`. This is the module that the trainer, its optimizer and the checkpoints see.
The student is saved under its own names; projectors have a file of their own in checkpoints, and no place in a finished run.

Axes: B sequences, L padded length, N supervised rows, M ids named by the student.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from student_trainer.data.row_packing import RowPacking
from student_trainer.errors import RunError
from student_trainer.labels.device_transfer import LabelTensors, ahead
from student_trainer.labels.rows_on_device import rows_on
from student_trainer.losses.head import Head
from student_trainer.losses.output.term import OutputTerm
from student_trainer.losses.term import JoinedLabels, LossTerm, StudentOutputs, SupervisedRows, Tap, TeacherLabels
from student_trainer.losses.total import Total, taps_of, total
from student_trainer.model.forward import SharedRows, StudentForward
from student_trainer.model.load import Student
from student_trainer.training.joined.joiner import Joiner
from student_trainer.training.windows import PaddedBatch
from teacher_wire.core.batch import TokenBatch

PROJECTORS = "projectors.safetensors"
# Times the student's learning rate, without weight decay: projectors start from nothing (docs/concepts/method.md 4.2). Not above the second number, unless the
# student's own rate is.
PROJECTOR_RATE, HIGHEST_PROJECTOR_RATE = 10.0, 1e-3


class Learner(nn.Module):
    """See module.

    Args:
        student: its model becomes a part of this module.
        terms: of the loss, at least one; those that are modules with parameters become `projectors`.
        narrowed: dtype that the student's passes are computed in by autocast; None for its own. The losses never are.
        teacher_head: the teacher's output head, for `hidden` labels.
        likeliest: k, if labels hold ids that the student has named beside the k likeliest; else 0.
        joiner: makes labels of the answers of several teachers; None in a run with one.

    Attributes:
        passes: how the student's passes are computed; recorded ones may be put here.
        projectors: what the terms train, by the name of the term.
    """

    def __init__(
        self,
        student: Student,
        terms: Sequence[LossTerm],
        *,
        narrowed: torch.dtype | None = None,
        teacher_head: Head | None = None,
        likeliest: int = 0,
        joiner: Joiner | None = None,
    ) -> None:
        super().__init__()
        self.student = student.model
        trained = {term.name: term for term in terms if isinstance(term, nn.Module) and list(term.parameters())}
        self.projectors = nn.ModuleDict(trained).to(student.outline.device)
        self.passes: StudentForward = self.plain
        self._loaded = student
        self._terms = tuple(terms)
        self._taps = taps_of(terms)
        self._narrowed = narrowed
        self._teacher_head = teacher_head
        self._likeliest = likeliest
        self._joiner = joiner

    @property
    def config(self) -> Any:
        """The student's; transformers' trainer and its callbacks ask for it."""
        return self.student.config

    @property
    def _keys_to_ignore_on_save(self) -> Any:
        """Of the student's weights; transformers' trainer asks after it has loaded some."""
        return getattr(self.student, "_keys_to_ignore_on_save", None)

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    def plain(self, input_ids_BL: Tensor, taps: Sequence[Tap] = (), shared: SharedRows | None = None) -> StudentOutputs:
        """A pass that is computed anew."""
        with self._autocast():
            return self._loaded.forward(input_ids_BL, taps, shared)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._narrowed is None else torch.autocast(self.device.type, self._narrowed)

    def forward(self, batch: PaddedBatch, normalizer: float | Tensor, step: int) -> Total:
        """The loss of one micro-batch of optimizer step `step`, divided by `normalizer`, the weight of its whole window."""
        device = self.device
        moved = ahead({"index_N": batch.index_N, "input_ids_BL": batch.input_ids_BL}, device)
        labels = None if batch.labels is None else self._labels(batch)
        rows = SupervisedRows(
            moved["index_N"], batch.labels_N, batch.weights_N, batch.position_N, batch.sequence_N, batch.sampled_logp_N
        )
        if batch.packing is None:
            outputs = self.passes(moved["input_ids_BL"], self._taps)
        else:  # never recorded: a recording reads ids alone
            outputs = self.plain(moved["input_ids_BL"], self._taps, SharedRows.of(batch.packing, device))
        return total(self._terms, outputs, labels, rows, normalizer, step)

    def _labels(self, batch: PaddedBatch) -> TeacherLabels | JoinedLabels:
        if self._joiner is not None:
            return self._joiner.labels(batch, self.device)
        assert isinstance(batch.labels, LabelTensors)
        there = batch.labels.to(self.device)
        return TeacherLabels(rows_on(there, self._teacher_head, self.device, self._likeliest), there.named)

    @torch.no_grad()
    def with_own_ids(self, batch: PaddedBatch, count: int, step: int) -> TokenBatch:
        """The tokens of a micro-batch with the student's `count` likeliest ids of each row, as it is now (docs/concepts/method.md 2.1)."""
        if batch.likeliest_NM is None:
            ids_NM = self._likeliest_ids(batch.input_ids_BL, batch.index_N, count, step, batch.packing)
        else:  # rollouts: the ids are those of their sampling, without a second pass
            ids_NM = batch.likeliest_NM.copy()
            asked_N = ids_NM[:, 0] < 0
            if asked_N.any():
                row_N, place_N = divmod(batch.index_N.numpy()[asked_N], batch.input_ids_BL.shape[1])
                rows, number_N = np.unique(row_N, return_inverse=True)
                index_N = torch.from_numpy(number_N * batch.input_ids_BL.shape[1] + place_N)
                packing = batch.packing.of_rows(rows) if batch.packing else None
                ids_NM[asked_N] = self._likeliest_ids(batch.input_ids_BL[rows], index_N, count, step, packing)
        return replace(batch.request.batch, extra_ids_NM=ids_NM)

    def _likeliest_ids(
        self, input_ids_BL: Tensor, index_N: Tensor, count: int, step: int, packing: RowPacking | None
    ) -> np.ndarray:
        """int32 [N, count], by a pass without dropout."""
        (term,) = (term for term in self._terms if isinstance(term, OutputTerm))
        self.eval()
        shared = SharedRows.of(packing, self.device) if packing else None
        outputs = self.plain(input_ids_BL.to(self.device), shared=shared)
        self.train()
        nothing_N = torch.zeros(0)
        rows = SupervisedRows(index_N.to(self.device), nothing_N, nothing_N)
        return term.likeliest_ids(outputs, rows, count, step).cpu().numpy().astype(np.int32)

    def save_projectors(self, folder: Path) -> None:
        """Writes them, if there are any."""
        state = {name: tensor.detach().contiguous().cpu() for name, tensor in self.projectors.state_dict().items()}
        if state:
            save_file(state, str(folder / PROJECTORS))

    def load_projectors(self, folder: Path) -> None:
        """Restores them, if there are any.

        Raises:
            RunError: they are missing, damaged or others.
        """
        if not len(self.projectors):
            return
        try:
            self.projectors.load_state_dict(load_file(str(folder / PROJECTORS)))
        except Exception as error:  # safetensors has an error class of its own
            raise RunError(f"{folder / PROJECTORS} cannot be read: {' '.join(str(error).split())[:300]}") from error

    def projector_group(self, learning_rate: float) -> dict[str, Any] | None:
        """The optimizer's group of them; None if there are none."""
        parameters = [p for p in self.projectors.parameters() if p.requires_grad]
        if not parameters:
            return None
        rate = max(learning_rate, min(PROJECTOR_RATE * learning_rate, HIGHEST_PROJECTOR_RATE))
        return {"params": parameters, "lr": rate, "weight_decay": 0.0}
