"""States that vLLM is asked for: all sequences of a batch are in its queue at once, and come back in the order it likes.

In: the batches of several requests; out: for each, the states of its wanted rows, as soon as vLLM has made all of them.
Axes: T tokens of a sequence, N wanted rows, D width.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor as Torch

from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import TeacherWireError

if TYPE_CHECKING:
    from teacher_server.backends.vllm.engine import Engine


class StatesUnderWay:
    """Begins when it is made.

    Args:
        engine: that scores.
        batches: what is asked of it.

    Attributes:
        took_s: how long the engine worked on these, as far as can be seen from here: from the last states of those before,
            or from the beginning if it was idle then, to the last states of these.
    """

    def __init__(self, engine: Engine, batches: list[TokenBatch]) -> None:
        self.took_s = 0.0
        self._engine = engine
        self._batches = batches
        self._began_s = time.perf_counter()
        self._asked: list[tuple[int, np.ndarray]] = []  # batch and wanted rows of each sequence that vLLM is given
        sequences: list[list[int]] = []
        for number, batch in enumerate(batches):
            for start, stop in zip(batch.cu_lengths_B1[:-1], batch.cu_lengths_B1[1:], strict=True):
                rows = np.flatnonzero(batch.wanted_T[start:stop])
                if len(rows):  # nothing behind the last wanted row is needed: attention is causal
                    self._asked.append((number, rows))
                    sequences.append(batch.token_ids_T[start : start + rows[-1] + 1].tolist())
        self._arrived: queue.SimpleQueue[tuple[int, Torch | TeacherWireError]] = queue.SimpleQueue()
        self._work = engine.encode(sequences, lambda *came: self._arrived.put(came))

    def states(self, like: Torch) -> Iterator[tuple[int, Torch]]:
        """(batch, states [N, D] of its wanted rows with the device and dtype of `like`), waited for.

        Raises:
            TeacherWireError: the engine refused a sequence, or died; what it still computes of these is taken back.
        """
        found: dict[int, Torch] = {}
        missing = np.bincount([number for number, _ in self._asked], minlength=len(self._batches))
        try:
            for left in range(len(self._asked), 0, -1):
                index, state_TD = self._arrived.get()
                if isinstance(state_TD, TeacherWireError):
                    raise state_TD
                if left == 1:
                    self._measure()
                number, rows = self._asked[index]
                wanted_ND = state_TD if len(rows) == len(state_TD) else state_TD[torch.from_numpy(rows)]
                found[index] = wanted_ND.to(device=like.device, dtype=like.dtype)
                missing[number] -= 1
                if not missing[number]:
                    mine = [i for i, (owner, _) in enumerate(self._asked) if owner == number]
                    yield number, torch.cat([found.pop(i) for i in mine])
        finally:
            self._work.cancel()

    def _measure(self) -> None:
        now_s = time.perf_counter()
        self.took_s = now_s - max(self._began_s, self._engine.last_states_s)
        self._engine.last_states_s = now_s
