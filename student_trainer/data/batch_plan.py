"""The whole run as one list of micro-batches: a pure function of seed, data size and batch size.

In: a dataset; out: micro-batch number -> indices of examples. No random state: a resumed run and the feed
compute the same list.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from student_trainer.data.dataset import TokenizedDataset
from student_trainer.schedules import permutation


class RunOrder:
    """Which examples each micro-batch of the run holds.

    Epochs follow one another without a gap: a window may end one permutation and begin the next, so that
    every optimizer step has exactly batch_size * accumulation sequences.

    Args:
        examples: size of the dataset.
        batch_size: sequences of a micro-batch.
        accumulation: micro-batches of a step.
        epochs: passes over the data, rounded up to whole steps; ignored if `max_steps` is given.
        max_steps: optimizer steps.
        seed: of the permutations.
    """

    def __init__(
        self, examples: int, *, batch_size: int, accumulation: int, epochs: float, max_steps: int | None, seed: int
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.steps = max_steps or math.ceil(epochs * examples / (batch_size * accumulation))
        self._seed = seed
        self._permutation = lru_cache(maxsize=4)(self._of_epoch)

    @property
    def batches(self) -> int:
        """Micro-batches of the run."""
        return self.steps * self.accumulation

    def __len__(self) -> int:
        """Sequences of the run, repetitions counted."""
        return self.batches * self.batch_size

    def __getitem__(self, position: int) -> int:
        """The example at a position of the run."""
        epoch, place = divmod(position, self.examples)
        return int(self._permutation(epoch)[place])

    def batch(self, number: int) -> list[int]:
        """The examples of micro-batch `number`."""
        start = number * self.batch_size
        return [self[position] for position in range(start, start + self.batch_size)]

    def epoch_at(self, step: int) -> float:
        """Passes over the data made after `step` optimizer steps."""
        return step * self.accumulation * self.batch_size / self.examples

    def _of_epoch(self, epoch: int) -> np.ndarray:
        return permutation(self._seed, epoch, self.examples)


def by_length(data: TokenizedDataset, batch_size: int) -> list[list[int]]:
    """Batches of indices in order of length, so that little is padded; for measuring, never for training."""
    order = sorted(range(len(data)), key=lambda index: (data[index].example.token_ids.size, index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
