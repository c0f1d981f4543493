"""Writing by an engine with running batches of its own: turns and bounds are ours, the batch is the engine's.

In: calls that have been checked; out: samples as they finish. `sequence_queue.SequenceQueue` decides which sequences the
engine holds, so that one tenant's flood does not fill it; a call that is closed takes its sequences out of the engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from teacher_server import faults
from teacher_server.config.server import GenerationConfig
from teacher_server.decoding.scheduler import QueuedGeneration
from teacher_server.decoding.sequence_queue import Sequence, SequenceQueue
from teacher_wire.core.errors import RequestError, TeacherWireError
from teacher_wire.generate.messages import Sample, SamplingSpec

log = logging.getLogger(__name__)
_MIN_TEMPERATURE = 0.01  # vLLM raises anything between 0 and this to it


@dataclass(frozen=True)
class Writer:
    """An engine that writes.

    Attributes:
        prepare: what can be refused before work starts; called in a thread of its own. Raises TeacherWireError.
        write: one sample; cancelling it takes the sequence out of the engine.
        check_health: raises RuntimeError if the engine is gone.
        counters: what the engine says of itself.
    """

    prepare: Callable[[SamplingSpec], None]
    write: Callable[[Sequence], Awaitable[Sample]]
    check_health: Callable[[], None]
    counters: Callable[[], dict[str, int]]


class EngineGeneration(QueuedGeneration):
    """See `generation.Generation`.

    Args:
        writer: the engine.
        limits: of this replica.
        exclusive: see `SequenceQueue`.
    """

    def __init__(self, writer: Writer, limits: GenerationConfig, *, exclusive: bool = False) -> None:
        super().__init__(writer.prepare, SequenceQueue(limits, exclusive=exclusive, paged=True))
        self._writer = writer
        self._writing: dict[int, asyncio.Task[None]] = {}

    def stop(self) -> None:
        super().stop()
        for task in self._writing.values():
            task.cancel()

    def check_health(self) -> None:
        self._writer.check_health()

    def counters(self) -> dict[str, Any]:
        return {**super().counters(), **self._writer.counters()}

    def _queued(self) -> None:
        for sequence in self._queue.admit():
            task = self._writing[sequence.number] = asyncio.create_task(self._write(sequence))
            task.add_done_callback(partial(self._written, sequence.number))

    def _dropped(self, running: list[int]) -> None:
        for number in running:
            self._writing[number].cancel()
        self._queued()

    def _written(self, number: int, _: asyncio.Task[None]) -> None:
        self._writing.pop(number)

    async def _write(self, sequence: Sequence) -> None:
        outcome: Sample | TeacherWireError
        try:
            outcome = await self._writer.write(sequence)
        except Exception as error:
            if not isinstance(error, TeacherWireError):
                log.exception("a sample failed")
            outcome = faults.as_wire_error(error, alone=f"one sequence of {sequence.tokens} tokens")
        self._ended(sequence, outcome)
        self._queued()


def refuse_sampling(spec: SamplingSpec) -> None:
    """What vLLM would do differently without a word.

    Raises:
        RequestError: a temperature between 0 and vLLM's smallest, or a schema whose text could not end.
    """
    if 0 < spec.temperature < _MIN_TEMPERATURE:
        raise RequestError(
            "this teacher draws at a temperature of 0, or at this and above",
            field="temperature", value=spec.temperature, limit=f">= {_MIN_TEMPERATURE}",
        )  # fmt: skip
    if spec.json_schema and (spec.ignore_eos or spec.stop_ids):
        raise RequestError(
            "this teacher ends a text under a schema with its own end of text",
            field="stop_ids" if spec.stop_ids else "ignore_eos", value=spec.json_schema[:40], limit="none",
        )  # fmt: skip


def sample_seed(seed: int, index: int, prompt_ids: np.ndarray) -> int:
    """The seed of one sample, below 2^63: a function of these three alone."""
    digest = hashlib.sha256(b"%d,%d," % (seed, index) + prompt_ids.astype("<i4").tobytes()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
