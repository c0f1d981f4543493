"""One backend and its queue, as an asyncio object: requests of many students in, shared forward passes, answers out.

The batcher decides, the backend computes in a thread of its own; this room only carries between them.
No Ray here: `teacher.py` puts an engine into a Serve deployment, benches use it bare.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

from teacher_server.backends import Backend, build_backend
from teacher_server.backends.base import OutsideBackend, WritingBackend
from teacher_server.batcher import Batcher, Job
from teacher_server.config import DEFAULT_TENANT, TeacherConfig
from teacher_server.generation import Result
from teacher_wire import codec
from teacher_wire.errors import CapabilityError, DeadlineError, ServerError, TeacherWireError, UnavailableError
from teacher_wire.generation import GenerateCall, Sample, check_generate
from teacher_wire.identity import text_sha256
from teacher_wire.messages import HeadHeader, Limits, ScoreCall, TeacherHead, TeacherInfo, TeacherSignals

log = logging.getLogger(__name__)

_BATCHES = 2  # under way at once: one on the device, one behind it
_RATE_MEMORY = 0.8  # of the measured tokens/s, a forward pass: about the last five count


@dataclass
class _Waiting:
    """A request in the queue or in a forward pass."""

    call: ScoreCall
    future: asyncio.Future[TeacherSignals]
    queued_s: float


class TeacherEngine:
    """Serves one teacher; `run()` must be running for answers to come.

    Args:
        config: of this teacher.
        backend: a loaded model; loaded from `config` if not given.
    """

    def __init__(self, config: TeacherConfig, backend: Backend | None = None) -> None:
        self._config = config
        self._backend = backend or build_backend(config.backend, deterministic=config.deterministic)
        self._batcher = Batcher(config.batch.max_tokens, config.batch.max_queue_tokens)
        self._ids = itertools.count()
        self._waiting: dict[int, _Waiting] = {}
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")
        self._waiter = ThreadPoolExecutor(max_workers=_BATCHES, thread_name_prefix="answers")
        self._room = asyncio.Semaphore(_BATCHES)
        self._under_way: set[asyncio.Task[None]] = set()
        self._last_end_s = 0.0
        self._task: asyncio.Task[None] | None = None
        self._head: TeacherHead | None = None
        self._head_once = asyncio.Lock()
        self.info = self._describe()
        self._generation = None
        if self.info.generates:
            writer = cast(WritingBackend, self._backend)
            self._generation = writer.generation(config.generation, self._on_thread, deterministic=config.deterministic)
        self.forward_tokens = 0
        self.forwards = 0
        self._ended: Counter[str] = Counter()  # requests by how they ended
        self._served: Counter[str] = Counter()  # tokens by tenant

    def _describe(self) -> TeacherInfo:
        facts, limits = self._backend.facts, self._config.limits
        sequence = min(limits.max_sequence_tokens or facts.max_sequence_tokens, facts.max_sequence_tokens)
        shared = {name: getattr(facts, name) for name in facts.__dataclass_fields__ if name != "max_sequence_tokens"}
        if self._config.deterministic:  # the same weights and other bits: labels of the two are not each other's
            shared["fingerprint"] = text_sha256(f"{facts.fingerprint} deterministic")
        return TeacherInfo(
            name=self._config.name,
            deterministic=self._config.deterministic,
            limits=Limits(
                max_sequence_tokens=sequence,
                max_request_tokens=limits.max_request_tokens,
                max_request_sequences=limits.max_request_sequences,
                max_k=min(limits.max_k, facts.vocab_rows),
                max_reply_bytes=limits.max_reply_mb << 20,
                **self._generation_limits(sequence),
            ),
            **shared,
        )

    def _generation_limits(self, max_sequence_tokens: int) -> dict[str, int]:
        settings = self._config.generation
        if not self._backend.facts.generates:
            return {}
        return {
            "max_new_tokens": min(settings.max_new_tokens, max_sequence_tokens - 1),
            "max_samples": settings.max_samples,
            "max_generate_tokens": settings.max_call_tokens,
            "max_schema_bytes": settings.max_schema_bytes,
        }

    def start(self) -> None:
        """Begins taking batches, in the running event loop."""
        self._task = asyncio.create_task(self._run())
        if self._generation is not None:
            self._generation.start()

    async def stop(self) -> None:
        """Ends; what still waits fails as unavailable."""
        for task in (self._task, *self._under_way):
            if task is not None:
                task.cancel()
        if self._generation is not None:
            self._generation.stop()
        for waiting in self._waiting.values():
            if not waiting.future.done():
                waiting.future.set_exception(UnavailableError(f"teacher {self._config.name!r} is going away"))
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._waiter.shutdown(wait=False, cancel_futures=True)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Shares of tenants from the next forward pass on; one that is not listed has that of DEFAULT_TENANT, or 1."""
        self._batcher.weights = dict(weights)
        self._batcher.default_weight = weights.get(DEFAULT_TENANT, 1.0)

    async def score(self, call: ScoreCall) -> TeacherSignals:
        """The labels of one request.

        Raises:
            TeacherWireError: refused, overloaded, or failed; see `teacher_wire.errors`.
        """
        codec.check_call(call, self.info)
        now = time.monotonic()
        job_id = next(self._ids)
        deadline = now + call.timeout_s if call.timeout_s else math.inf
        self._batcher.add(Job(job_id, call.tenant, call.batch.tokens, deadline))
        waiting = _Waiting(call, asyncio.get_running_loop().create_future(), now)
        self._waiting[job_id] = waiting
        self._wake.set()
        try:
            answer = await waiting.future
            self._ended["answered"] += 1
            return answer
        except asyncio.CancelledError:
            self._ended["cancelled"] += 1
            raise
        except TeacherWireError as error:
            self._ended["expired" if isinstance(error, DeadlineError) else "failed"] += 1
            raise
        finally:
            self._waiting.pop(job_id, None)
            self._batcher.cancel(job_id)  # no effect once it is in a batch

    def generate(self, call: GenerateCall) -> AsyncGenerator[Sample, None]:
        """Samples as they finish; closing the generator stops the work at the next token.

        Raises:
            TeacherWireError: refused, overloaded, or failed; see `teacher_wire.errors`.
        """
        check_generate(call, self.info)
        assert self._generation is not None, "checked with the capabilities"
        return self._generation.generate(call)

    async def _on_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    async def head_header(self, fingerprint: str) -> HeadHeader:
        """All of the output head but the weight. Raises CapabilityError."""
        return (await self._loaded_head(fingerprint)).header

    async def head_bytes(self, fingerprint: str, offset: int, size: int) -> bytes:
        """A slice of the head's weight bytes."""
        weight = (await self._loaded_head(fingerprint)).weight_VD.array
        return bytes(weight.data.cast("B")[offset : offset + size])

    async def _loaded_head(self, fingerprint: str) -> TeacherHead:
        if fingerprint and fingerprint != self.info.fingerprint:
            raise CapabilityError(
                "no head of that teacher here", field="fingerprint", value=self.info.fingerprint, limit=fingerprint
            )
        async with self._head_once:
            if self._head is None:  # copied and hashed once, beside the forward passes and not between them
                self._head = await asyncio.to_thread(self._backend.head)
        return self._head

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._batcher.queued_jobs:
                await self._room.acquire()  # and only then choose: the later, the fuller and fairer
                jobs, expired = self._batcher.next_batch(time.monotonic())
                for job in expired:
                    self._fail(
                        job.job_id,
                        DeadlineError(
                            "dropped from the queue unscored", field="timeout_s", value=self._waited(job.job_id)
                        ),
                    )
                batch = [self._waiting[job.job_id] for job in jobs if job.job_id in self._waiting]
                if batch:
                    begun = asyncio.Event()
                    task = asyncio.create_task(self._score_batch(batch, begun))
                    self._under_way.add(task)
                    task.add_done_callback(self._batch_ended)
                    await begun.wait()
                else:
                    self._room.release()

    def _waited(self, job_id: int) -> str:
        return f"{time.monotonic() - self._waiting[job_id].queued_s:.3f}" if job_id in self._waiting else ""

    def _batch_ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._room.release()

    async def _score_batch(self, batch: list[_Waiting], begun: asyncio.Event) -> None:
        """Answers a batch; `begun` is set once the backend can take the next one, so that the device never waits."""
        started = time.monotonic()
        jobs = [(waiting.call.batch, waiting.call.spec) for waiting in batch]
        tokens = sum(asked.tokens for asked, _ in jobs)
        self.forwards += 1
        self.forward_tokens += tokens
        try:
            loop = asyncio.get_running_loop()
            finish = await loop.run_in_executor(self._thread, self._backend.begin, jobs)
            begun.set()
            answers = await loop.run_in_executor(self._waiter, finish)
            answered = list(zip(batch, answers, strict=True))
        except Exception as error:
            log.exception("forward pass of %d requests failed", len(batch))
            if len(batch) > 1:  # one of them may be the cause: the others must not pay for it
                for waiting in batch:
                    await self._score_batch([waiting], begun)
            elif not batch[0].future.done():
                known = (
                    error if isinstance(error, TeacherWireError) else ServerError(f"{type(error).__name__}: {error}")
                )
                batch[0].future.set_exception(known)
            begun.set()
            return
        now = time.monotonic()
        self._measure(tokens, now - max(started, self._last_end_s))
        self._last_end_s = now
        for waiting, signals in answered:
            self._served[waiting.call.tenant] += waiting.call.batch.tokens
            queue_us = round((started - waiting.queued_s) * 1e6)
            if not waiting.future.done():
                waiting.future.set_result(
                    replace(
                        signals, timing=replace(signals.timing, queue_us=queue_us), fingerprint=self.info.fingerprint
                    )
                )

    def _measure(self, tokens: int, took_s: float) -> None:
        rate, before = tokens / max(took_s, 1e-6), self._batcher.tokens_per_s
        self._batcher.tokens_per_s = _RATE_MEMORY * before + (1 - _RATE_MEMORY) * rate if before else rate

    def _fail(self, job_id: int, error: TeacherWireError) -> None:
        waiting = self._waiting.get(job_id)
        if waiting is not None and not waiting.future.done():
            waiting.future.set_exception(error)

    def check_health(self) -> None:
        """Raises RuntimeError if no answer can ever come again."""
        if self._task is None or self._task.done():
            raise RuntimeError(f"the batch loop of teacher {self._config.name!r} has ended")
        if self._generation is not None:
            self._generation.check_health()
        if isinstance(self._backend, OutsideBackend):
            self._backend.check_health()

    def counters(self) -> dict[str, Any]:
        """What this replica has done and holds, for status displays and tests."""
        queued = self._batcher.queued_tokens_of()
        tenants = {
            name: {"queued_tokens": queued.get(name, 0), "served_tokens": self._served[name]}
            for name in {*queued, *self._served}
        }
        return {
            "queued_tokens": self._batcher.queued_tokens,
            "queued_jobs": self._batcher.queued_jobs,
            "waiting": len(self._waiting),
            "forwards": self.forwards,
            "forward_tokens": self.forward_tokens,
            "max_batch_tokens": self._config.batch.max_tokens,
            **{name: self._ended[name] for name in ("answered", "failed", "expired", "cancelled")},
            "tenants": tenants,
            **(self._generation.counters() if self._generation is not None else {}),
        }
