"""Writing by an engine with running batches of its own: turns and bounds are ours, the batch is the engine's.

In: calls that have been checked; out: samples as they finish. `generation.SequenceQueue` decides which sequences the
engine holds, so that one tenant's flood does not fill it; a call that is closed takes its sequences out of the engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from teacher_server.config import GenerationConfig
from teacher_server.generation import Sequence, SequenceQueue
from teacher_wire.errors import RequestError, ServerError, TeacherWireError, UnavailableError
from teacher_wire.generation import GenerateCall, Sample, SamplingSpec

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


@dataclass
class _Open:
    """A call under way: what it still waits for, and what has come."""

    left: int
    arrived: asyncio.Queue[Sample | TeacherWireError] = field(default_factory=asyncio.Queue)


class EngineGeneration:
    """See `generation.Generation`.

    Args:
        writer: the engine.
        limits: of this replica.
        exclusive: see `generation.SequenceQueue`.
    """

    def __init__(self, writer: Writer, limits: GenerationConfig, *, exclusive: bool = False) -> None:
        self._writer = writer
        self._queue = SequenceQueue(limits, exclusive=exclusive)
        self._preparing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._numbers = itertools.count()
        self._open: dict[int, _Open] = {}
        self._writing: dict[int, asyncio.Task[None]] = {}
        self._samples = self._tokens = 0

    def start(self) -> None:
        """Nothing has to run while nothing is asked for."""

    def stop(self) -> None:
        for opened in self._open.values():
            opened.arrived.put_nowait(UnavailableError("the teacher is going away"))
        for task in self._writing.values():
            task.cancel()
        self._preparing.shutdown(wait=False, cancel_futures=True)

    def check_health(self) -> None:
        self._writer.check_health()

    def counters(self) -> dict[str, int]:
        return {
            "generate_calls": len(self._open),
            "generate_running": len(self._queue.running),
            "generate_waiting": self._queue.waiting,
            "generated_samples": self._samples,
            "generated_tokens": self._tokens,
            **self._writer.counters(),
        }

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Sample, None]:
        await asyncio.get_running_loop().run_in_executor(self._preparing, self._writer.prepare, call.spec)
        number = next(self._numbers)
        sequences = [
            Sequence(next(self._numbers), number, prompt, index, call.prompts.prompt(prompt), call.spec)
            for prompt, index in call.wanted()
        ]
        self._queue.add(call.tenant, sequences)
        opened = self._open[number] = _Open(len(sequences))
        self._admit()
        try:
            while opened.left:
                outcome = await opened.arrived.get()
                if isinstance(outcome, TeacherWireError):
                    raise outcome
                opened.left -= 1
                yield outcome
        finally:
            self._open.pop(number, None)
            for running in self._queue.drop(number):
                self._writing[running].cancel()
            self._admit()

    def _admit(self) -> None:
        for sequence in self._queue.admit():
            task = self._writing[sequence.number] = asyncio.create_task(self._write(sequence))
            task.add_done_callback(partial(self._ended, sequence.number))

    def _ended(self, number: int, _: asyncio.Task[None]) -> None:
        self._writing.pop(number)

    async def _write(self, sequence: Sequence) -> None:
        outcome: Sample | TeacherWireError
        try:
            outcome = await self._writer.write(sequence)
            self._samples += 1
            self._tokens += len(outcome.token_ids_n)
        except TeacherWireError as error:
            outcome = error
        except Exception as error:
            log.exception("a sample failed")
            outcome = ServerError(f"{type(error).__name__}: {error}")
        self._queue.running.pop(sequence.number, None)
        if sequence.call in self._open:
            self._open[sequence.call].arrived.put_nowait(outcome)
        self._admit()


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
