"""Calls of many students in, running sequences, samples out: the asyncio side of writing, without torch.

In: calls that have been checked; out: samples as they finish. `sequence_queue.SequenceQueue` decides with ints which sequences
join; what writes them is a `Stepper` (one token of each a step, on the model's thread, so that scoring goes on in between), or
an engine with running batches of its own (`backends.vllm_writing`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from teacher_server import faults
from teacher_server.config.server import DEFAULT_TENANT, GenerationConfig
from teacher_server.decoding.sequence_queue import Sequence, SequenceQueue
from teacher_wire.core.errors import OverloadedError, TeacherWireError, UnavailableError
from teacher_wire.generate.messages import GenerateCall, Sample, SamplingSpec

log = logging.getLogger(__name__)
Result = TypeVar("Result")
OnThread = Callable[..., Awaitable[Any]]


class Stepper(Protocol):
    """A model that writes; see `backends.stepper`."""

    def prepare(self, spec: SamplingSpec) -> None:
        """What can be refused or made ready before work starts; called in a thread of its own. Raises RequestError."""

    def step(self, joining: list[Sequence], leaving: list[int]) -> list[tuple[int, Sample | TeacherWireError]]:
        """Lets sequences in and out, makes one token of each that is there, and gives those that end with it."""

    def reset(self) -> None:
        """Forgets every sequence, after a failed step."""


class Generation(Protocol):
    """What answers Generate in a server's event loop."""

    def start(self) -> None:
        """Begins, in the running event loop."""

    def generate(self, call: GenerateCall) -> AsyncGenerator[Sample, None]:
        """Samples as they finish; closing it stops the work."""

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Shares of tenants from now on; one that is not listed has that of DEFAULT_TENANT, or 1."""

    def fail(self, error: TeacherWireError) -> None:
        """Every call under way ends with this error."""

    def stop(self) -> None:
        """Ends; what is under way fails as unavailable."""

    def check_health(self) -> None:
        """Raises RuntimeError if no sample can ever come again."""

    def counters(self) -> dict[str, Any]:
        """What is under way and what has been done: `WRITING_COUNTERS`, `tenants`, and figures of the backend's own."""


WRITING_COUNTERS = (
    "generate_calls",  # open now
    "generate_running",  # sequences that are written now
    "generate_waiting",  # sequences that have not begun
    "generate_waiting_tokens",  # what these may come to hold
    "generated_samples",  # since the start
    "generated_tokens",
    "generate_refused",  # calls that met a full queue
)


@dataclass
class _Open:
    """A call under way: what it still waits for, and what has come."""

    tenant: str
    left: int
    arrived: asyncio.Queue[Sample | TeacherWireError] = field(default_factory=asyncio.Queue)


class QueuedGeneration:
    """A `Generation` over a `SequenceQueue`; subclasses say what writes.

    Args:
        prepare: what can be refused before work starts; called in a thread of its own. Raises TeacherWireError.
        queue: which sequences run.
    """

    def __init__(self, prepare: Callable[[SamplingSpec], None], queue: SequenceQueue) -> None:
        self._prepare = prepare
        self._queue = queue
        self._preparing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._numbers = itertools.count()
        self._open: dict[int, _Open] = {}
        self._samples = self._tokens = self._refused = 0
        self._served: Counter[str] = Counter()  # prompt and new tokens by tenant
        self._refused_of: Counter[str] = Counter()

    def start(self) -> None:
        """Begins, in the running event loop."""

    def set_weights(self, weights: Mapping[str, float]) -> None:
        self._queue.weights = dict(weights)
        self._queue.default_weight = weights.get(DEFAULT_TENANT, 1.0)

    def stop(self) -> None:
        self.fail(UnavailableError("the teacher is going away"))
        self._preparing.shutdown(wait=False, cancel_futures=True)

    def fail(self, error: TeacherWireError) -> None:
        for opened in self._open.values():
            opened.arrived.put_nowait(error)

    def counters(self) -> dict[str, Any]:
        queued = self._queue.queued_tokens_of()
        return {
            "generate_calls": len(self._open),
            "generate_running": len(self._queue.running),
            "generate_waiting": self._queue.waiting + self._queue.begin_again,
            "generate_waiting_tokens": self._queue.waiting_tokens,
            "generated_samples": self._samples,
            "generated_tokens": self._tokens,
            "generate_refused": self._refused,
            "tenants": {
                name: {
                    "queued_tokens": queued.get(name, 0),
                    "served_tokens": self._served[name],
                    "refused": self._refused_of[name],
                }
                for name in {*queued, *self._served, *self._refused_of}
            },
        }

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Sample, None]:
        await asyncio.get_running_loop().run_in_executor(self._preparing, self._prepare, call.spec)
        number = next(self._numbers)
        sequences = (
            Sequence(next(self._numbers), number, prompt, index, call.prompts.prompt(prompt), call.spec)
            for prompt, index in call.wanted()
        )
        try:
            self._queue.add(call.tenant, number, sequences, call.samples, call.tokens)
        except OverloadedError:
            self._refused += 1
            self._refused_of[call.tenant] += 1
            raise
        opened = self._open[number] = _Open(call.tenant, call.samples)
        self._queued()
        try:
            while opened.left:
                outcome = await opened.arrived.get()
                if isinstance(outcome, TeacherWireError):
                    raise outcome
                opened.left -= 1
                yield outcome
        finally:
            self._open.pop(number, None)
            self._dropped(self._queue.drop(number))

    def _ended(self, sequence: Sequence, outcome: Sample | TeacherWireError) -> None:
        """Passes on what became of a sequence, unless its call was closed meanwhile."""
        written = len(outcome.token_ids_n) if isinstance(outcome, Sample) else 0
        if self._queue.end(sequence.number, written) is None or sequence.call not in self._open:
            return
        opened = self._open[sequence.call]
        if isinstance(outcome, Sample):
            self._samples += 1
            self._tokens += written
            self._served[opened.tenant] += len(sequence.prompt_ids) + written
        opened.arrived.put_nowait(outcome)

    def _queued(self) -> None:
        """Sequences have been queued."""
        raise NotImplementedError

    def _dropped(self, running: list[int]) -> None:
        """Sequences have been taken back, of which these run."""
        raise NotImplementedError


class SteppedGeneration(QueuedGeneration):
    """A `Generation` over a `Stepper`.

    Args:
        stepper: what writes.
        limits: of this replica.
        on_thread: runs a step where nothing else of the model runs.
        exclusive: see `SequenceQueue`.
    """

    def __init__(
        self, stepper: Stepper, limits: GenerationConfig, on_thread: OnThread, *, exclusive: bool = False
    ) -> None:
        super().__init__(stepper.prepare, SequenceQueue(limits, exclusive=exclusive))
        self._stepper = stepper
        self._on_thread = on_thread
        self._leaving: list[int] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._steps = self._failed_steps = 0
        self._step_s = 0.0

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        super().stop()

    def check_health(self) -> None:
        if self._task is None or self._task.done():
            raise RuntimeError("the loop that writes has ended")

    def counters(self) -> dict[str, Any]:
        return {
            **super().counters(),
            "generate_steps": self._steps,
            "generate_failed_steps": self._failed_steps,
            "generate_step_ms": round(1e3 * self._step_s, 1),
        }

    def _queued(self) -> None:
        self._wake.set()

    def _dropped(self, running: list[int]) -> None:
        self._leaving += running
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while True:
                leaving, self._leaving = self._leaving, []
                joining = self._queue.admit()
                if not (self._queue.running or leaving):
                    break
                await self._step(joining, leaving)

    async def _step(self, joining: list[Sequence], leaving: list[int]) -> None:
        started = time.monotonic()
        failed: Exception | None = None
        try:
            outcomes = await self._on_thread(self._stepper.step, joining, leaving)
        except Exception as error:
            failed = error
        if failed is not None:  # handled out here: inside `except` the traceback would keep the tensors of the step
            await self._recover(failed, joining)
            return
        self._steps += 1
        self._step_s = time.monotonic() - started
        self._queue.stepped()
        for number, outcome in outcomes:
            sequence = self._queue.running.get(number)
            if sequence is not None:  # else taken back while it was made
                self._ended(sequence, outcome)

    async def _recover(self, error: Exception, joining: list[Sequence]) -> None:
        """After a failed step: what it held begins again, fewer at a time; a sequence that fails alone is to blame.

        What a sample becomes depends on its prompt, seed and number alone, so that beginning again changes none.
        """
        held = list(self._queue.running.values())
        kind = faults.kind_of(error)
        self._failed_steps += 1
        log.error("a step of %d sequences failed", len(held), exc_info=error)
        alone = f"one sequence of {held[0].tokens} tokens" if held else "nothing"
        told = faults.as_wire_error(error, alone=alone)
        faults.release(error)
        self._leaving = []
        if kind == "device":
            self.fail(told)
            for sequence in held:
                self._queue.end(sequence.number)
            return
        await self._on_thread(self._stepper.reset)
        if len(held) > 1:
            self._queue.narrow(joining, memory=kind == "memory")
        elif held and held[0].number in self._queue.running:
            self._ended(held[0], told)
