"""One backend and its queue, as an asyncio object: requests of many students in, shared forward passes, answers out.

The batcher decides, the backend computes in a thread of its own; this room only carries between them.
No Ray here: `deployment.py` puts an engine into a Serve deployment, benches use it bare.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np

from teacher_server import faults
from teacher_server.backends.base import Backend, EachBackend, OutsideBackend, WritingBackend
from teacher_server.config.server import DEFAULT_TENANT, TeacherConfig
from teacher_server.decoding.scheduler import Result
from teacher_server.replica import features
from teacher_server.replica.artifacts import ReplicaArtifacts
from teacher_server.replica.counts import Counts
from teacher_server.replica.description import description
from teacher_server.replica.pieces import Piece, Waiting, cuts
from teacher_server.replica.reading import Reader
from teacher_server.replica.score_queue import Batcher, Job
from teacher_server.telemetry.latency import Latencies
from teacher_wire.artifacts.messages import ArtifactCall, ArtifactHeader
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import DeadlineError, OverloadedError, TeacherWireError, UnavailableError
from teacher_wire.core.signals import TeacherSignals, Timing
from teacher_wire.generate.messages import GenerateCall, PromptBatch, Sample, SamplingSpec, check_generate
from teacher_wire.score.signals import spec_of

log = logging.getLogger(__name__)

_BATCHES = 2  # under way at once: one on the device, one behind it
_ANSWER_BYTES = 1 << 30  # of labels that one batch may make, if no single reply is allowed more
_PROBE_TENANT = "(probe)"


class TeacherEngine:
    """Serves one teacher; `run()` must be running for answers to come.

    Args:
        config: of this teacher.
        backend: a loaded model; loaded from `config` if not given.
        on_observe: told every latency, stage and seconds; see `latency`.
    """

    def __init__(
        self,
        config: TeacherConfig,
        backend: Backend | None = None,
        on_observe: Callable[[str, float], None] | None = None,
    ) -> None:
        self._config = config
        self._backend = features.ready(config, backend)
        answer_bytes = max(_ANSWER_BYTES, config.limits.max_reply_mb << 20)
        batch, small = config.batch, config.batch.small_tokens
        self._batcher = Batcher(
            batch.max_tokens, batch.max_queue_tokens, interactive_tokens=small, max_answer_bytes=answer_bytes
        )
        self._health = faults.Health(config.hang_s)
        self._probing: asyncio.Task[None] | None = None
        self._latencies = Latencies(on_observe)
        self._ids = itertools.count()
        self._waiting: dict[int, Waiting] = {}
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")
        self._waiter = ThreadPoolExecutor(max_workers=_BATCHES, thread_name_prefix="answers")
        self._room = asyncio.Semaphore(_BATCHES)
        self._under_way: set[asyncio.Task[None]] = set()
        self._last_end_s = 0.0
        self._task: asyncio.Task[None] | None = None
        self.reader = Reader(self._backend, description(config, self._backend.facts))
        self.info, self._counts = self.reader.info, Counts()
        self._artifacts = ReplicaArtifacts(self._backend, self.info, self.reader.artifacts)
        self._generation = None
        if self.info.generates:
            writer = cast(WritingBackend, self._backend)
            self._generation = writer.generation(config.generation, self._on_thread, deterministic=config.deterministic)

    def start(self) -> None:
        """Begins taking batches, in the running event loop."""
        self._task = asyncio.create_task(self._run())
        if self._generation is not None:
            self._generation.start()

    async def stop(self) -> None:
        """Ends; what still waits fails as unavailable."""
        for task in (self._task, self._probing, *self._under_way):
            if task is not None:
                task.cancel()
        if self._generation is not None:
            self._generation.stop()
        self.reader.close()
        for waiting in self._waiting.values():
            if not waiting.future.done():
                waiting.future.set_exception(UnavailableError(f"teacher {self._config.name!r} is going away"))
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._waiter.shutdown(wait=False, cancel_futures=True)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Shares of tenants from the next forward pass on; one that is not listed has that of DEFAULT_TENANT, or 1."""
        self._batcher.weights = dict(weights)
        self._batcher.default_weight = weights.get(DEFAULT_TENANT, 1.0)
        if self._generation is not None:
            self._generation.set_weights(weights)

    async def score(self, call: ScoreCall) -> TeacherSignals:
        """The labels of one request.

        Raises:
            TeacherWireError: refused, overloaded, or failed; see `teacher_wire.core.errors`.
        """
        answer_bytes = features.check_call(call, self.info)
        self._health.refuse()
        now = time.monotonic()
        job_id = next(self._ids)
        deadline = now + call.timeout_s if call.timeout_s else math.inf
        bounds, pieces = cuts(call.batch)
        tokens = call.batch.tokens
        try:
            self._batcher.add(Job(job_id, call.tenant, tokens, deadline, answer_bytes, call.interactive, pieces))
        except OverloadedError:
            self._counts.ended["refused"] += 1
            self._counts.refused[call.tenant] += 1
            raise
        waiting = Waiting(call, asyncio.get_running_loop().create_future(), now, bounds)
        self._waiting[job_id] = waiting
        self._wake.set()
        try:
            answer = await waiting.future
            self._counts.answered(interactive=call.interactive)
            return answer
        except asyncio.CancelledError:
            self._counts.ended["cancelled"] += 1
            raise
        except TeacherWireError as error:
            self._counts.ended["expired" if isinstance(error, DeadlineError) else "failed"] += 1
            raise
        finally:
            self._waiting.pop(job_id, None)
            self._batcher.cancel(job_id)  # no effect once it is in a batch

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Sample, None]:
        """Samples as they finish; closing the generator stops the work at the next token.

        Raises:
            TeacherWireError: refused, overloaded, or failed; see `teacher_wire.core.errors`.
        """
        check_generate(call, self.info)
        self._health.refuse()
        assert self._generation is not None, "checked with the capabilities"
        outcome = "cancelled"  # unless it comes to an end here
        samples = self._generation.generate(call)
        try:
            async for sample in samples:
                yield sample
            outcome = "answered"
        except TeacherWireError as error:
            outcome = "refused" if isinstance(error, OverloadedError) else "failed"
            raise
        finally:
            self._counts.ended[outcome] += 1
            await samples.aclose()

    async def _on_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        """A call of the generation, where nothing else of the model runs."""
        return await self._counted("write", self._thread, work, *arguments)

    async def _counted(
        self, kind: faults.Work, executor: ThreadPoolExecutor, work: Callable[..., Result], *arguments: object
    ) -> Result:
        """Runs work of the backend; what comes of it decides over the replica's health."""
        try:
            result = await self._on(executor, work, *arguments)
        except Exception as error:
            self._failed(error, kind)
            raise
        self._health.succeeded(kind)
        return result

    async def _on(self, executor: ThreadPoolExecutor, work: Callable[..., Result], *arguments: object) -> Result:
        """Runs work of the backend, and watches that it ends."""

        def watched() -> Result:
            with self._health.running():
                return work(*arguments)

        return await asyncio.get_running_loop().run_in_executor(executor, watched)

    def _failed(self, error: Exception, kind: faults.Work) -> None:
        self._health.failure(error, kind)
        if self._health.reason:
            self._give_up()
        elif self._health.needs_probe and (self._probing is None or self._probing.done()):
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        """Computes one token known to be good: if even that fails, it is not the requests that are to blame."""
        failed: Exception | None = None
        try:
            if "top_k" in self.info.transports:  # as every backend that scores has it
                job = (TokenBatch.pack([[0, 0]]), spec_of("top_k", self.info.vocab_rows, k=1))
                await self._on(self._thread, self._backend.score, [job])
            if self._generation is not None:
                one = SamplingSpec(temperature=0.0, max_new_tokens=1, ignore_eos=True)
                prompt = PromptBatch(np.zeros(1, np.int32), np.array([0, 1], np.int32))
                call = GenerateCall(self.info.name, "", one, prompt, tenant=_PROBE_TENANT)
                async for _ in self._generation.generate(call):
                    pass
        except (OverloadedError, UnavailableError):
            return  # says nothing; the next failure probes again
        except Exception as error:
            log.error("the probe after %d failed forward passes failed too", self._health.failed, exc_info=error)
            failed = error
        self._health.probed(failed)
        if self._health.reason:
            self._give_up()

    def _give_up(self) -> None:
        """This replica is lost: whoever waits here asks another one."""
        log.error("this replica of teacher %r is given up: %s", self._config.name, self._health.reason)
        lost = UnavailableError(faults.LOST)
        for job_id in list(self._waiting):
            self._fail(job_id, lost)
        if self._generation is not None:
            self._generation.fail(lost)

    async def artifact_header(self, call: ArtifactCall) -> ArtifactHeader:
        """See `ReplicaArtifacts.header`."""
        return await self._artifacts.header(call)

    async def artifact_bytes(self, call: ArtifactCall, offset: int, size: int) -> bytes:
        """See `ReplicaArtifacts.slice`."""
        return await self._artifacts.slice(call, offset, size)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._batcher.queued_jobs:
                await self._room.acquire()  # and only then choose: the later, the fuller and fairer
                now = time.monotonic()
                # Bulk requests begin behind no other pass while interactive ones come, which would wait for both.
                alone = bool(self._under_way) and self._batcher.interactive_comes(now)
                jobs, expired = self._batcher.next_batch(now, only_interactive=alone)
                for job in expired:
                    self._expire(job.job_id, now)
                batch = [self._waiting[job.job_id].piece(job) for job in jobs if job.job_id in self._waiting]
                if batch:
                    begun = asyncio.Event()
                    task = asyncio.create_task(self._score_batch(batch, begun))
                    self._under_way.add(task)
                    task.add_done_callback(self._batch_ended)
                    await begun.wait()
                    continue
                self._room.release()
                if alone and not jobs:
                    break  # until the pass has ended or another request comes

    def _expire(self, job_id: int, now: float) -> None:
        if job_id in self._waiting:
            waited = f"{now - self._waiting[job_id].queued_s:.3f}"
            self._fail(job_id, DeadlineError("dropped from the queue unscored", field="timeout_s", value=waited))

    def _batch_ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._room.release()
        self._wake.set()

    async def _score_batch(self, batch: list[Piece], begun: asyncio.Event) -> None:
        """Answers a batch; `begun` is set once the backend can take the next one, so that the device never waits."""
        started = time.monotonic()
        tokens = sum(piece.tokens for piece in batch)
        interactive = all(piece.waiting.call.interactive for piece in batch)
        self._counts.began(tokens, interactive=interactive)
        for piece in batch:
            piece.waiting.begun_s = piece.waiting.begun_s or started
        failed: Exception | None = None
        try:
            if interactive and isinstance(self._backend, EachBackend):
                timing = await self._each(self._backend, batch, begun)
            else:
                finish = await self._on(self._thread, self._backend.begin, [piece.job for piece in batch])
                begun.set()
                answers = await self._on(self._waiter, finish)
                for piece, signals in zip(batch, answers, strict=True):
                    self._answer(piece, signals)
                timing = answers[0].timing
        except Exception as error:
            failed = error
        if failed is not None:  # handled out here: inside `except` the traceback would keep the tensors of the batch
            await self._divide(batch, failed, begun)
            return
        self._health.succeeded("score")
        now = time.monotonic()
        self._batcher.measure(tokens, now - max(started, self._last_end_s))
        self._last_end_s = now
        self._latencies.observe("forward", timing.forward_us / 1e6 or now - started)
        self._latencies.observe("reduce", timing.reduce_us / 1e6)

    async def _each(self, backend: EachBackend, batch: list[Piece], begun: asyncio.Event) -> Timing:
        """Answers each request as soon as its labels are on the host; the times of the batch."""
        finish = await self._on(self._thread, backend.begin_each, [piece.job for piece in batch])
        begun.set()
        loop = asyncio.get_running_loop()

        def hand_out() -> Timing:
            timing = Timing()
            for place, signals in finish():
                timing = signals.timing
                loop.call_soon_threadsafe(self._answer, batch[place], signals)
            return timing

        return await self._on(self._waiter, hand_out)

    def _answer(self, piece: Piece, signals: TeacherSignals) -> None:
        waiting = piece.waiting
        self._counts.served[waiting.call.tenant] += piece.tokens
        if waiting.take(piece, signals, self.info.fingerprint):
            assert waiting.begun_s is not None
            stage = "interactive_queue" if waiting.call.interactive else "queue"
            self._latencies.observe(stage, waiting.begun_s - waiting.queued_s)

    async def _divide(self, batch: list[Piece], error: Exception, begun: asyncio.Event) -> None:
        """After a failed batch: both halves by themselves, so that in the end only the request that cannot be answered pays.

        A lost device fails all as unavailable; memory that does not suffice for one request is told as overloaded.
        """
        log.error("forward pass of %d requests failed", len(batch), exc_info=error)
        told = faults.as_wire_error(error, alone=f"a request of {batch[0].tokens} tokens")
        self._failed(error, "score")
        faults.release(error)
        if len(batch) > 1 and not self._health.reason:
            middle = len(batch) // 2
            for half in (batch[:middle], batch[middle:]):
                wanted = [piece for piece in half if not piece.waiting.future.done()]
                if wanted:
                    await self._score_batch(wanted, begun)
        else:
            for piece in batch:
                if not piece.waiting.future.done():
                    piece.waiting.future.set_exception(told)
        begun.set()

    def _fail(self, job_id: int, error: TeacherWireError) -> None:
        waiting = self._waiting.get(job_id)
        if waiting is not None and not waiting.future.done():
            waiting.future.set_exception(error)

    def check_health(self) -> None:
        """Raises RuntimeError if no answer can ever come again: a loop has ended, or the forward passes fail or hang."""
        if self._task is None or self._task.done():
            raise RuntimeError(f"the batch loop of teacher {self._config.name!r} has ended")
        if self._health.hung and not self._health.reason:
            self._health.give_up(self._health.hung)
            self._give_up()
        self._health.check()
        if self._generation is not None:
            self._generation.check_health()
        if isinstance(self._backend, OutsideBackend):
            self._backend.check_health()

    def counters(self) -> dict[str, Any]:
        """What this replica has done and holds, for status displays and tests."""
        writing = self._generation.counters() if self._generation is not None else {}
        tenants = self._counts.tenants(self._batcher.queued_tokens_of(), writing.pop("tenants", {}))
        interactive_tokens, interactive_jobs = self._batcher.queued_interactive()
        return {
            "queued_tokens": self._batcher.queued_tokens,
            "queued_jobs": self._batcher.queued_jobs,
            "interactive_queued_tokens": interactive_tokens,
            "interactive_queued_requests": interactive_jobs,
            "waiting": len(self._waiting),
            "failed_forwards": self._health.failed,
            "given_up": int(bool(self.trouble)),
            "max_batch_tokens": self._config.batch.max_tokens,
            **self._counts.told(),
            **self.reader.counters(),
            "latency": self._latencies.counters(),
            "tenants": tenants,
            **writing,
        }

    @property
    def trouble(self) -> str:
        """Why this replica can answer nothing any more, or ""."""
        try:
            self.check_health()
        except RuntimeError as error:
            return str(error)
        return ""
