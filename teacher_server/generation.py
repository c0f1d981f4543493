"""Calls of many students in, one running batch of sequences, samples out: the asyncio side of writing, without torch.

In: calls that have been checked; out: samples as they finish. `SequenceQueue` decides with ints which sequences join; a
`Stepper` makes one token of each a step, on the model's thread, so that scoring goes on in between.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from teacher_server.config import GenerationConfig
from teacher_wire.errors import OverloadedError, ServerError, TeacherWireError, UnavailableError
from teacher_wire.generation import GenerateCall, Sample, SamplingSpec

log = logging.getLogger(__name__)
Result = TypeVar("Result")
OnThread = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, eq=False)
class Sequence:
    """One sample to be written.

    Attributes:
        number: unique in this process.
        call: number of the call it belongs to.
        prompt, index: which sample of that call.
        prompt_ids: int32 [T].
    """

    number: int
    call: int
    prompt: int
    index: int
    prompt_ids: np.ndarray
    spec: SamplingSpec

    @property
    def tokens(self) -> int:
        """What it may come to hold."""
        return len(self.prompt_ids) + self.spec.max_new_tokens


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

    def stop(self) -> None:
        """Ends; what is under way fails as unavailable."""

    def check_health(self) -> None:
        """Raises RuntimeError if no sample can ever come again."""

    def counters(self) -> dict[str, int]:
        """What is under way and what has been done."""


class SequenceQueue:
    """Which sequences run: a policy over ints. Tenants take turns, sequences of one tenant keep their order.

    Args:
        limits: of this replica.
        exclusive: only sequences of one call run together (deterministic serving).
    """

    def __init__(self, limits: GenerationConfig, *, exclusive: bool = False) -> None:
        self._limits = limits
        self._exclusive = exclusive
        self._tenants: OrderedDict[str, deque[Sequence]] = OrderedDict()
        self.running: dict[int, Sequence] = {}
        self.waiting_tokens = 0

    def add(self, tenant: str, sequences: list[Sequence]) -> None:
        """Queues all sequences of a call, or none.

        Raises:
            OverloadedError: the queue is full.
        """
        tokens = sum(sequence.tokens for sequence in sequences)
        if self.waiting_tokens and self.waiting_tokens + tokens > self._limits.max_queue_tokens:
            raise OverloadedError(
                "the teacher's queue is full", field="generation.queue_tokens",
                value=self.waiting_tokens + tokens, limit=self._limits.max_queue_tokens, retry_after_s=1.0,
            )  # fmt: skip
        self._tenants.setdefault(tenant, deque()).extend(sequences)
        self.waiting_tokens += tokens

    def admit(self) -> list[Sequence]:
        """Those that begin now. One larger than the whole cache runs alone."""
        joining: list[Sequence] = []
        held = sum(sequence.tokens for sequence in self.running.values())
        while self._tenants and len(self.running) < self._limits.max_running:
            tenant, waiting = next(iter(self._tenants.items()))
            first = waiting[0]
            if self.running and held + first.tokens > self._limits.max_cache_tokens:
                break
            if self._exclusive and any(other.call != first.call for other in self.running.values()):
                break
            waiting.popleft()
            self._tenants.move_to_end(tenant)
            if not waiting:
                del self._tenants[tenant]
            self.waiting_tokens -= first.tokens
            held += first.tokens
            self.running[first.number] = first
            joining.append(first)
        return joining

    def drop(self, call: int) -> list[int]:
        """Takes a call back; the numbers of its sequences that run."""
        for tenant in list(self._tenants):
            kept = deque(sequence for sequence in self._tenants[tenant] if sequence.call != call)
            self.waiting_tokens -= sum(sequence.tokens for sequence in self._tenants[tenant] if sequence.call == call)
            self._tenants[tenant] = kept
            if not kept:
                del self._tenants[tenant]
        leaving = [number for number, sequence in self.running.items() if sequence.call == call]
        for number in leaving:
            del self.running[number]
        return leaving

    @property
    def waiting(self) -> int:
        """Sequences that have not begun."""
        return sum(map(len, self._tenants.values()))


@dataclass
class _Open:
    """A call under way: what it still waits for, and what has come."""

    left: int
    arrived: asyncio.Queue[Sample | TeacherWireError] = field(default_factory=asyncio.Queue)


class SteppedGeneration:
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
        self._stepper = stepper
        self._queue = SequenceQueue(limits, exclusive=exclusive)
        self._on_thread = on_thread
        self._preparing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._numbers = itertools.count()
        self._open: dict[int, _Open] = {}
        self._leaving: list[int] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._samples = self._tokens = self._steps = 0

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._fail_all(UnavailableError("the teacher is going away"))
        self._preparing.shutdown(wait=False, cancel_futures=True)

    def check_health(self) -> None:
        if self._task is None or self._task.done():
            raise RuntimeError("the loop that writes has ended")

    def counters(self) -> dict[str, int]:
        return {
            "generate_calls": len(self._open),
            "generate_running": len(self._queue.running),
            "generate_waiting": self._queue.waiting,
            "generated_samples": self._samples,
            "generated_tokens": self._tokens,
            "generate_steps": self._steps,
        }

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Sample, None]:
        await asyncio.get_running_loop().run_in_executor(self._preparing, self._stepper.prepare, call.spec)
        number = next(self._numbers)
        sequences = [
            Sequence(next(self._numbers), number, prompt, index, call.prompts.prompt(prompt), call.spec)
            for prompt, index in call.wanted()
        ]
        self._queue.add(call.tenant, sequences)
        opened = self._open[number] = _Open(len(sequences))
        self._wake.set()
        try:
            while opened.left:
                outcome = await opened.arrived.get()
                if isinstance(outcome, TeacherWireError):
                    raise outcome
                opened.left -= 1
                yield outcome
        finally:
            self._open.pop(number, None)
            self._leaving += self._queue.drop(number)
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
        try:
            outcomes = await self._on_thread(self._stepper.step, joining, leaving)
        except Exception as error:
            log.exception("a step of %d sequences failed", len(self._queue.running))
            self._fail_all(ServerError(f"{type(error).__name__}: {error}"))
            self._leaving = []
            await self._on_thread(self._stepper.reset)
            return
        self._steps += 1
        for number, outcome in outcomes:
            sequence = self._queue.running.pop(number, None)
            if sequence is None or sequence.call not in self._open:  # taken back while it was made
                continue
            if isinstance(outcome, Sample):
                self._samples += 1
                self._tokens += len(outcome.token_ids_n)
            self._open[sequence.call].arrived.put_nowait(outcome)

    def _fail_all(self, error: TeacherWireError) -> None:
        for number, opened in self._open.items():
            self._queue.drop(number)
            opened.arrived.put_nowait(error)
