"""The engine: shared forward passes, refusals by name, one bad request alone, nothing spent on what was taken back."""

import asyncio
import contextlib
import threading
import time
from dataclasses import replace

import pytest

from teacher_server.backends.fake import FakeModel
from teacher_server.config import FakeBackend, TeacherConfig
from teacher_server.engine import TeacherEngine
from teacher_wire.errors import DeadlineError, MismatchError, OverloadedError, ServerError
from teacher_wire.messages import ScoreCall, SignalSpec, TokenBatch

SPEC = SignalSpec("full", 64)
POISON = 63


class Model(FakeModel):
    """Waits at a gate, counts, and fails on a poisoned token."""

    def __init__(self) -> None:
        super().__init__(FakeBackend())
        self.gate = threading.Event()
        self.gate.set()
        self.batches = []

    def score(self, jobs):
        self.gate.wait()
        self.batches.append([int(batch.token_ids_T[0]) for batch, _ in jobs])
        if any(POISON in batch.token_ids_T for batch, _ in jobs):
            raise RuntimeError("poisoned")
        return super().score(jobs)


@contextlib.asynccontextmanager
async def running(**changes):
    model = Model()
    config = TeacherConfig.model_validate({"name": "t", "backend": {"kind": "fake"}, **changes})
    engine = TeacherEngine(config, model)
    engine.start()
    try:
        yield engine, model
    finally:
        model.gate.set()
        await engine.stop()


def call(first, length=4, **changes):
    return replace(ScoreCall(f"r{first}", "t", "", SPEC, TokenBatch.pack([[first] * length])), **changes)


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_what_waits_together_runs_together():
    async with running() as (engine, model):
        model.gate.clear()
        tasks = [asyncio.create_task(engine.score(call(i))) for i in range(6)]
        await until(lambda: engine.counters()["waiting"] == 6)
        model.gate.set()
        answers = await asyncio.gather(*tasks)
        assert sum(map(len, model.batches)) == 6 and len(model.batches) <= 2
        assert {answer.fingerprint for answer in answers} == {engine.info.fingerprint}
        assert engine.counters() == {
            "queued_tokens": 0,
            "queued_jobs": 0,
            "waiting": 0,
            "forwards": len(model.batches),
            "forward_tokens": 24,
            "max_batch_tokens": 16_384,
            "answered": 6,
            "failed": 0,
            "expired": 0,
            "cancelled": 0,
            "tenants": {"": {"queued_tokens": 0, "served_tokens": 24}},
        }


async def test_one_bad_request_fails_alone():
    async with running() as (engine, model):
        model.gate.clear()
        tasks = [asyncio.create_task(engine.score(call(i))) for i in (0, 1, POISON, 2)]
        await until(lambda: engine.counters()["waiting"] == 4)
        model.gate.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(outcomes.pop(2), ServerError)
        assert all(outcome.rows == 3 for outcome in outcomes)
        engine.check_health()


async def test_a_full_queue_and_a_foreign_request_are_refused_by_name():
    async with running(batch={"max_tokens": 8, "max_queue_tokens": 8}) as (engine, model):
        model.gate.clear()
        first = asyncio.create_task(engine.score(call(0)))
        await until(lambda: engine.counters()["forwards"] == 1)
        rest = [asyncio.create_task(engine.score(call(i))) for i in (1, 2)]
        await until(lambda: engine.counters()["queued_tokens"] == 8)
        with pytest.raises(OverloadedError) as caught:
            await engine.score(call(3))
        assert caught.value.retry_after_s > 0
        with pytest.raises(MismatchError):
            await engine.score(call(4, fingerprint="f" * 64))
        model.gate.set()
        await asyncio.gather(first, *rest)


async def test_cancelled_and_late_requests_cost_no_forward_pass():
    async with running() as (engine, model):
        model.gate.clear()
        first = asyncio.create_task(engine.score(call(0)))
        await until(lambda: engine.counters()["forwards"] == 1)
        cancelled = asyncio.create_task(engine.score(call(1)))
        late = asyncio.create_task(engine.score(call(2, timeout_s=0.01)))
        await until(lambda: engine.counters()["queued_jobs"] == 2)
        cancelled.cancel()
        time.sleep(0.02)
        await asyncio.sleep(0)
        model.gate.set()
        with pytest.raises(DeadlineError):
            await late
        await first
        assert model.batches == [[0]]


async def test_an_ended_batch_loop_is_unhealthy():
    async with running() as (engine, _):
        engine.check_health()
        engine._task.cancel()
        await until(engine._task.done)
        with pytest.raises(RuntimeError, match="ended"):
            engine.check_health()
