"""What is learned from at a step: windows of micro-batches, made ready before the trainer sees them.

In: data and their order, or whatever else makes examples; out: for each step its examples and what a teacher is asked about them.
The trainer never indexes the data itself; a window is a pure function of (seed, step), so that a resumed run sees the same.

Axes: B sequences, L padded length, N supervised rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import IndexedExample, TokenizedDataset, collate
from student_trainer.data.row_packing import RowPacking, pack_rows
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.joined.answer import JoinedAnswer
from student_trainer.labels.packing import pack, pack_own
from student_trainer.labels.source import LabelRequest
from student_trainer.losses.align import row_index
from student_trainer.rollout.examples import RolloutExample


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The sequences of one pass.

    Attributes:
        number: among all micro-batches of the run, from 0.
        examples: in the order of the request.
        request: what a teacher is asked about them.
    """

    number: int
    examples: tuple[IndexedExample, ...]
    request: LabelRequest

    @classmethod
    def of(cls, number: int, examples: Sequence[IndexedExample]) -> MicroBatch:
        """With the request that belongs to the examples."""
        return cls(number, tuple(examples), pack([item.example for item in examples]))


@dataclass(frozen=True, eq=False)
class Window:
    """What one optimizer step learns from.

    Attributes:
        step: from 0.
        batches: its micro-batches, as many as `WindowSource.accumulation`.
    """

    step: int
    batches: tuple[MicroBatch, ...]


class WindowSource(Protocol):
    """Where windows come from."""

    @property
    def steps(self) -> int:
        """Of the run."""

    @property
    def accumulation(self) -> int:
        """Micro-batches of a window."""

    @property
    def batch_size(self) -> int:
        """Sequences of a micro-batch."""

    @property
    def batches(self) -> int:
        """Micro-batches of the run: steps * accumulation."""

    def window(self, step: int) -> Window:
        """The window of optimizer step `step`, counted from 0; may wait for whoever makes it."""

    def request(self, number: int) -> LabelRequest:
        """What a teacher is asked about micro-batch `number`; called ahead of `window`, by another thread, and may wait."""

    def micro_batch(self, number: int) -> MicroBatch:
        """Micro-batch `number`, of which several teachers are asked each what it is responsible for; called as `request`."""

    def epoch_at(self, step: int) -> float:
        """Passes over the data made after `step` steps."""

    def close(self) -> None:
        """Nothing more will be asked for; whoever waits in `request` is woken by a CancelledRequestError. May come twice."""


class FixedOrder:
    """Windows of data that are all there, in the order of the run."""

    def __init__(self, data: TokenizedDataset, order: RunOrder) -> None:
        self._data = data
        self._order = order
        self.steps = order.steps
        self.accumulation = order.accumulation
        self.batch_size = order.batch_size
        self.batches = order.batches

    def window(self, step: int) -> Window:
        first = step * self.accumulation
        return Window(step, tuple(self._batch(number) for number in range(first, first + self.accumulation)))

    def request(self, number: int) -> LabelRequest:
        return self._batch(number).request

    def micro_batch(self, number: int) -> MicroBatch:
        return self._batch(number)

    def epoch_at(self, step: int) -> float:
        return self._order.epoch_at(step)

    def close(self) -> None:
        """Nobody waits here."""

    def _batch(self, number: int) -> MicroBatch:
        return MicroBatch.of(number, [self._data[index] for index in self._order.batch(number)])


# where windows come from -> what makes them of a run's data and order. A new source is one line here.
SOURCES: dict[str, Callable[[TokenizedDataset, RunOrder], WindowSource]] = {"data": FixedOrder}


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """A micro-batch as the student reads it, on the host: what is known there need not be read from the device.

    Attributes:
        input_ids_BL: int64, right-padded.
        index_N: int64, where the supervised rows are in the flattened batch.
        sequence_N, position_N: int64, of each of them its sequence, in the order of the request, and its position there.
        labels_N: int64, the tokens they describe.
        weights_N: float32, of their losses.
        request: names and tokens as the teacher is asked about them, packed.
        labels: what the teacher answered, or several have; None where none was asked.
        sampled_logp_N: float32, log-probability of each label under the weights and temperature that sampled it; NaN in rows of the
            data. None where no sequence is a rollout.
        likeliest_NM: int32, the student's own likeliest ids of each row when it was sampled; -1 in rows of the data. None where no
            sequence is a rollout, or none is known.
        packing: which sequences share the rows of `input_ids_BL`; None where each has its own.
    """

    input_ids_BL: Tensor
    index_N: Tensor
    sequence_N: np.ndarray
    position_N: np.ndarray
    labels_N: Tensor
    weights_N: Tensor
    request: LabelRequest
    labels: LabelTensors | JoinedAnswer | None = None
    sampled_logp_N: Tensor | None = None
    likeliest_NM: np.ndarray | None = None
    packing: RowPacking | None = None

    @property
    def weight(self) -> float:
        """Of its supervised rows together."""
        return float(self.weights_N.sum(dtype=torch.float64))


def padded(
    batch: MicroBatch, pad_id: int, length: Callable[[int], int] = lambda longest: longest, *, shares_rows: bool = False
) -> PaddedBatch:
    """Pads a micro-batch.

    Args:
        pad_id: written behind the shorter sequences.
        length: L for a longest sequence of so many tokens; not less.
        shares_rows: several sequences may stand in one row (`train.packing`).
    """
    packed = batch.request.batch
    if any(
        item.example.teacher is not None for item in batch.examples
    ):  # who reads other prompts before the same targets
        packed = pack_own([item.example for item in batch.examples])
    packing = pack_rows([item.example.token_ids.size for item in batch.examples], length) if shares_rows else None
    if packing is None:
        ids_BL = collate(batch.examples, pad_id, length)["input_ids"]
    else:
        ids_BL = torch.full(packing.sequence_RL.shape, pad_id, dtype=torch.int64)
        for b, item in enumerate(batch.examples):
            row, start = int(packing.row_B[b]), int(packing.start_B[b])
            ids_BL[row, start : start + item.example.token_ids.size] = torch.from_numpy(item.example.token_ids).long()
    index_N = row_index(packed.cu_lengths_B1, packed.wanted_T, ids_BL.shape[1])
    sequence_N, position_N = divmod(index_N, ids_BL.shape[1])
    if packing is not None:
        index_N = packing.row_B[sequence_N] * ids_BL.shape[1] + packing.start_B[sequence_N] + position_N
    return PaddedBatch(
        ids_BL,
        torch.from_numpy(index_N),
        sequence_N,
        position_N,
        torch.from_numpy(packed.labels_N()).long(),
        torch.from_numpy(np.concatenate([item.example.target_weights for item in batch.examples])),
        batch.request,
        sampled_logp_N=_sampled_logp(batch.examples),
        likeliest_NM=likeliest_ids(batch.examples),
        packing=packing,
    )


def _sampled_logp(items: Sequence[IndexedExample]) -> Tensor | None:
    """float32 [N] of a micro-batch's targets, NaN in those of the data; None if all are."""
    examples = [item.example for item in items]
    if not any(isinstance(example, RolloutExample) for example in examples):
        return None
    parts = [
        example.sampled_logp_N
        if isinstance(example, RolloutExample)
        else np.full(int(example.loss_mask.sum()), np.nan, np.float32)
        for example in examples
    ]
    return torch.from_numpy(np.concatenate(parts))


def likeliest_ids(items: Sequence[IndexedExample]) -> np.ndarray | None:
    """int32 [N, M] of a micro-batch's targets, -1 in those of the data; None if none is known."""
    known = [item.example.likeliest_NM if isinstance(item.example, RolloutExample) else None for item in items]
    count = next((ids_NM.shape[1] for ids_NM in known if ids_NM is not None), 0)
    if not count:
        return None
    rows = [int(item.example.loss_mask.sum()) for item in items]
    return np.concatenate(
        [np.full((n, count), -1, np.int32) if ids_NM is None else ids_NM for n, ids_NM in zip(rows, known, strict=True)]
    )


class SequenceNumbers(Dataset[int]):
    """The numbers of the run's sequences, by which transformers' data loader counts; the windows themselves come from their source."""

    def __init__(self, windows: WindowSource) -> None:
        self._count = windows.batches * windows.batch_size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> int:
        return number


def numbers_only(numbers: list[int]) -> dict[str, Any]:
    """A collator that reads no data."""
    return {"numbers": tuple(numbers)}
