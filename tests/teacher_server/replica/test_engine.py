"""The engine: shared forward passes, refusals by name, one bad request alone, nothing spent on what was taken back."""

import asyncio
import contextlib
import threading
import time
from dataclasses import replace

import pytest

from teacher_server.backends.fake import FakeModel
from teacher_server.config.backends import FakeBackend
from teacher_server.config.server import TeacherConfig
from teacher_server.replica import engine as engine_module
from teacher_server.replica.engine import TeacherEngine
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import DeadlineError, MismatchError, OverloadedError, ServerError, UnavailableError
from teacher_wire.generate.messages import GenerateCall, PromptBatch, SamplingSpec
from teacher_wire.score.signals import spec_of

SPEC = spec_of("full", 64)
POISON = 63


class Model(FakeModel):
    """Waits at a gate, counts, and fails on a poisoned token."""

    def __init__(self, **settings) -> None:
        super().__init__(FakeBackend(**settings))
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
        counters = engine.counters()
        latency = counters.pop("latency")
        assert latency["queue"]["count"] == 6 and latency["forward"]["count"] == len(model.batches)
        assert sum(latency["queue"]["buckets"].values()) == 6
        assert {name: value for name, value in counters.items() if not name.startswith(("generate", "tokeniz"))} == {
            "queued_tokens": 0,
            "queued_jobs": 0,
            "interactive_queued_tokens": 0,
            "interactive_queued_requests": 0,
            "interactive_forwards": 0,
            "interactive_tokens": 0,
            "interactive_answered": 0,
            "waiting": 0,
            "forwards": len(model.batches),
            "forward_tokens": 24,
            "failed_forwards": 0,
            "given_up": 0,
            "max_batch_tokens": 16_384,
            "answered": 6,
            "failed": 0,
            "expired": 0,
            "cancelled": 0,
            "refused": 0,
            "tenants": {"": {"queued_tokens": 0, "served_tokens": 24, "refused": 0}},
        }


async def test_a_batch_holds_labels_of_no_more_bytes_than_its_budget(monkeypatch):
    """The rows of `full` are all held until the batch is over: 5 GB for one of few tokens, of a large vocabulary."""
    monkeypatch.setattr(engine_module, "_ANSWER_BYTES", 0, raising=False)  # then the largest reply is the budget
    model, spec = Model(vocab_rows=4096), spec_of("full", 4096)
    config = {"name": "t", "backend": {"kind": "fake", "vocab_rows": 4096}, "limits": {"max_reply_mb": 1}}
    engine = TeacherEngine(TeacherConfig.model_validate(config), model)
    engine.start()
    model.gate.clear()
    tasks = [asyncio.create_task(engine.score(call(i, 21, spec=spec))) for i in range(12)]  # 20 rows, 320 KB
    tasks += [asyncio.create_task(engine.score(call(i, 21))) for i in range(12, 24)]  # 20 rows, 5 KB
    await until(lambda: engine.counters()["waiting"] == len(tasks))
    model.gate.set()
    answers = await asyncio.gather(*tasks)
    await engine.stop()
    assert [answer.rows for answer in answers] == [20] * 24
    large = [sum(first < 12 for first in batch) for batch in model.batches]
    assert sum(large) == 12 and max(large) <= 3, model.batches
    assert len(model.batches) < 12, "small answers travel together"


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
        assert engine.counters()["refused"] == engine.counters()["tenants"][""]["refused"] == 1
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


class Broken(Model):
    """Fails as told: `fails(tokens of the batch)` gives an exception or None."""

    def __init__(self, fails) -> None:
        super().__init__()
        self.fails = fails

    def score(self, jobs):
        self.gate.wait()
        self.batches.append(sorted(int(batch.token_ids_T[0]) for batch, _ in jobs))
        error = self.fails(self.batches[-1])
        if error is not None:
            raise error
        return FakeModel.score(self, jobs)


@contextlib.asynccontextmanager
async def breaking(fails, **changes):
    model = Broken(fails)
    engine = TeacherEngine(TeacherConfig.model_validate({"name": "t", "backend": {"kind": "fake"}, **changes}), model)
    engine.start()
    try:
        yield engine, model
    finally:
        model.gate.set()
        await engine.stop()


async def together(engine, model, firsts):
    model.gate.clear()
    tasks = [asyncio.create_task(engine.score(call(i))) for i in firsts]
    await until(lambda: engine.counters()["waiting"] == len(tasks))
    model.gate.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_batch_that_does_not_fit_is_halved_and_nobody_fails():
    def fails(batch):
        return RuntimeError("CUDA out of memory. Tried to allocate 5.00 GiB") if len(batch) > 2 else None

    async with breaking(fails) as (engine, model):
        outcomes = await together(engine, model, range(9))
        assert all(outcome.rows == 3 for outcome in outcomes)
        assert sum(len(batch) == 1 for batch in model.batches) <= 2, "halves, not one by one"
        engine.check_health()


async def test_one_request_that_never_fits_is_told_to_come_back_and_the_others_are_answered():
    def fails(batch):
        return MemoryError("no memory for it") if 7 in batch else None

    async with breaking(fails) as (engine, model):
        outcomes = await together(engine, model, range(8))
        refused = outcomes.pop(7)
        assert isinstance(refused, OverloadedError) and refused.field == "device memory" and refused.retry_after_s > 0
        assert all(outcome.rows == 3 for outcome in outcomes)
        assert len(model.batches) <= 9
        engine.check_health()


async def test_a_lost_device_is_fatal_at_once_and_told_as_unavailable():
    def fails(batch):
        return RuntimeError("CUDA error: device-side assert triggered") if 5 in batch else None

    async with breaking(fails, batch={"max_tokens": 8}) as (engine, model):
        outcomes = await together(engine, model, range(8))
        assert [type(outcome) for outcome in outcomes[4:]] == [UnavailableError] * 4
        with pytest.raises(RuntimeError, match="device-side assert"):
            engine.check_health()
        done = len(model.batches)
        with pytest.raises(UnavailableError, match="being replaced"):
            await engine.score(call(1))
        with pytest.raises(UnavailableError, match="being replaced"):
            await anext(engine.generate(GenerateCall("t", "", SamplingSpec(), PromptBatch.pack([[1]]))))
        assert len(model.batches) == done and engine.counters()["given_up"] == 1 and "assert" in engine.trouble


async def test_failures_in_a_row_are_probed_and_a_hostile_request_kills_no_replica():
    async with breaking(lambda batch: RuntimeError("odd") if 9 in batch else None) as (engine, model):
        for _ in range(8):
            with pytest.raises(ServerError):
                await engine.score(call(9))
        await until(lambda: engine._probing is not None and engine._probing.done())
        assert [0] in model.batches, "its own request"
        engine.check_health()
        assert engine.counters()["failed_forwards"] == 8


async def test_a_backend_that_fails_on_everything_is_given_up_after_its_own_probe():
    async with breaking(lambda batch: RuntimeError("weights are gone")) as (engine, _):
        engine.check_health()
        for _ in range(3):
            with pytest.raises((ServerError, UnavailableError)):
                await engine.score(call(1))
        await until(lambda: engine.trouble)
        with pytest.raises(RuntimeError, match="its own probe failed too: RuntimeError: weights are gone"):
            engine.check_health()


async def test_a_forward_pass_that_hangs_makes_the_replica_unhealthy_and_callers_ask_another_one():
    async with running(hang_s=3600) as (engine, model):
        engine._health._clock = lambda: now_s
        now_s, before = 0.0, len(model.batches)
        model.gate.clear()
        tasks = [asyncio.create_task(engine.score(call(first))) for first in range(3)]
        await until(lambda: engine._health._running)
        now_s = 3599.0
        engine.check_health()
        now_s = 3601.0
        with pytest.raises(RuntimeError, match=r"has run for 3601 s \(hang_s 3600\)"):
            engine.check_health()
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(answer, UnavailableError)
        with pytest.raises(UnavailableError):
            await engine.score(call(9))
        assert engine.counters()["given_up"] == 1 and len(model.batches) == before


async def test_an_idle_replica_is_healthy_however_long_it_waits():
    async with running(hang_s=1) as (engine, _):
        now_s = 0.0
        engine._health._clock = lambda: now_s
        await engine.score(call(1))
        now_s = 1e6
        engine.check_health()


async def test_without_a_limit_a_forward_pass_may_take_for_ever():
    async with running(hang_s=None) as (engine, model):
        now_s = 0.0
        engine._health._clock = lambda: now_s
        model.gate.clear()
        task = asyncio.create_task(engine.score(call(2)))
        await until(lambda: engine._health._running)
        now_s = 1e6
        engine.check_health()
        model.gate.set()
        await task
