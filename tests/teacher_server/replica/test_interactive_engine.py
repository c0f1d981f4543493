"""Interactive requests at the engine: before bulk, in pieces and out of them, handed out one by one, counted by lane."""

import asyncio
import contextlib
import threading

import numpy as np
import pytest
import torch

from teacher_server.backends.fake import FakeModel
from teacher_server.backends.transformers.backend import load
from teacher_server.config.backends import FakeBackend, TransformersBackend
from teacher_server.config.server import BatchConfig, TeacherConfig
from teacher_server.replica.engine import TeacherEngine
from teacher_server.replica.pieces import cuts
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import DeadlineError, ServerError
from teacher_wire.score.signals import spec_of
from tests.tiny import make_model

SPEC = spec_of("full", 64)
POISON = 63


class Gated(FakeModel):
    """Lets one forward pass through for each `step`, once `hold` was called; notes what was in each."""

    def __init__(self) -> None:
        super().__init__(FakeBackend())
        self.passes = threading.Semaphore(10**6)
        self.batches = []

    def hold(self):
        self.passes = threading.Semaphore(0)

    def score(self, jobs):
        self.batches.append([[int(i) for i in batch.token_ids_T[batch.cu_lengths_B1[:-1]]] for batch, _ in jobs])
        self.passes.acquire()
        if any(POISON in batch.token_ids_T for batch, _ in jobs):
            raise RuntimeError("poisoned")
        return super().score(jobs)


class GatedEach(Gated):
    """The same, handing out the answers of a batch one by one; waits before each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = threading.Semaphore(0)

    def begin_each(self, jobs):
        answers = self.score(jobs)

        def each():
            for place, signals in enumerate(answers):
                self.answers.acquire()
                if POISON in jobs[place][0].token_ids_T:
                    raise RuntimeError("poisoned")
                yield place, signals

        return each


@contextlib.asynccontextmanager
async def running(model=None, **batch):
    model = model or Gated()
    config = TeacherConfig.model_validate({"name": "t", "backend": {"kind": "fake"}, "batch": batch})
    engine = TeacherEngine(config, model)
    engine.start()
    try:
        yield engine, model
    finally:
        model.passes.release(10**6)
        if isinstance(model, GatedEach):
            model.answers.release(10**6)
        await engine.stop()


def asked(*firsts, length=4, latency="bulk", **changes):
    batch = TokenBatch.pack([[first] * length for first in firsts])
    return ScoreCall("r", "t", "", SPEC, batch, latency=latency, **changes)


def start(engine, *calls):
    return [asyncio.create_task(engine.score(call)) for call in calls]


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


async def test_an_interactive_request_waits_for_no_pass_but_the_one_that_runs():
    async with running(max_tokens=8) as (engine, model):
        model.hold()
        tasks = start(engine, *(asked(i) for i in range(10)))
        await until(lambda: len(model.batches) == 1)
        tasks += start(engine, asked(50, latency="interactive"))
        await until(lambda: engine.counters()["waiting"] == 11)
        assert engine.counters()["interactive_queued_requests"] == 1
        model.passes.release(2)
        await tasks[-1]
        assert model.batches[1] == [[50]]
        model.passes.release(100)
        await asyncio.gather(*tasks)
        counters = engine.counters()
        told = {name: value for name, value in counters.items() if name.startswith("interactive")}
        assert told == {
            "interactive_queued_tokens": 0,
            "interactive_queued_requests": 0,
            "interactive_forwards": 1,
            "interactive_tokens": 4,
            "interactive_answered": 1,
        }
        assert counters["answered"] == 11 and counters["forward_tokens"] == 44
        assert counters["latency"]["interactive_queue"]["count"] == 1 and counters["latency"]["queue"]["count"] == 10


async def test_a_bulk_request_in_pieces_has_the_answer_that_it_has_whole():
    call = asked(*range(12))
    async with running() as (engine, _):
        whole = await engine.score(call)
    async with running(max_tokens=48, interactive_tokens=8) as (engine, model):
        model.hold()
        (first,) = start(engine, asked(60, latency="interactive"))
        await until(lambda: len(model.batches) == 1)
        (task,) = start(engine, call)
        await until(lambda: engine.counters()["queued_jobs"] == 1)
        model.passes.release(2)
        await first
        await until(lambda: len(model.batches) == 3)
        later = start(engine, asked(61, latency="interactive"))
        await until(lambda: engine.counters()["interactive_queued_requests"] == 1)
        model.passes.release(100)
        answer = await task
        await later[0]
    assert [len(pieces[0]) for pieces in model.batches].count(2) == 6, model.batches
    assert model.batches.index([[61]]) < 5, "between two pieces"
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(answer[name].array, tensor.array)
    assert answer.fingerprint == whole.fingerprint and engine.counters()["answered"] == 3
    assert engine.counters()["tenants"][""]["served_tokens"] == 56


async def test_a_piece_that_fails_fails_its_request_and_the_rest_is_not_computed():
    async with running(max_tokens=48, interactive_tokens=8) as (engine, model):
        model.hold()
        tasks = start(engine, asked(1, latency="interactive"))
        await until(lambda: len(model.batches) == 1)
        tasks += start(engine, asked(2, 3, POISON, 4, 5, 6, 7, 8), asked(9))
        await until(lambda: engine.counters()["queued_jobs"] == 2)
        model.passes.release(10**6)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(outcomes[1], ServerError) and outcomes[0].rows == outcomes[2].rows == 3
        assert not any(7 in piece for batch in model.batches for piece in batch)
        assert engine.counters()["queued_tokens"] == 0


async def test_a_cancelled_and_a_late_interactive_request_cost_nothing():
    async with running() as (engine, model):
        model.hold()
        (first,) = start(engine, asked(0))
        await until(lambda: len(model.batches) == 1)
        cancelled, late = start(
            engine, asked(1, latency="interactive"), asked(2, latency="interactive", timeout_s=0.001)
        )
        await until(lambda: engine.counters()["interactive_queued_requests"] == 2)
        cancelled.cancel()
        await asyncio.sleep(0.01)
        model.passes.release(10)
        with pytest.raises(DeadlineError):
            await late
        await first
        assert model.batches == [[[0]]] and engine.counters()["interactive_queued_tokens"] == 0


async def test_the_first_request_of_an_interactive_batch_is_answered_before_the_last_one_is_reduced():
    async with running(GatedEach()) as (engine, model):
        model.hold()
        tasks = start(engine, asked(0))
        await until(lambda: len(model.batches) == 1)
        tasks += start(engine, asked(1, latency="interactive"), asked(2, latency="interactive"))
        await until(lambda: engine.counters()["interactive_queued_requests"] == 2)
        model.passes.release(10)
        model.answers.release()
        await tasks[1]
        assert model.batches[1] == [[1], [2]] and not tasks[2].done()
        model.answers.release()
        assert (await tasks[2]).rows == 3


async def test_of_a_batch_that_breaks_amid_its_answers_those_that_came_are_kept():
    async with running(GatedEach()) as (engine, model):
        model.hold()
        tasks = start(engine, asked(0))
        await until(lambda: len(model.batches) == 1)
        model.score = lambda jobs: FakeModel.score(model, jobs)
        tasks += start(engine, asked(1, latency="interactive"), asked(POISON, latency="interactive"))
        await until(lambda: engine.counters()["interactive_queued_requests"] == 2)
        model.passes.release(10)
        model.answers.release(10)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert outcomes[1].rows == 3 and isinstance(outcomes[2], ServerError)


def test_a_piece_always_has_a_wanted_row():
    wanted = [[False, False], [True, False], [False, False], [True, False], [False, False]]
    batch = TokenBatch.pack([[1, 2], [3, 4], [5, 6], [7, 8], [9, 9]], wanted)
    assert cuts(batch) == ([0, 3, 5], (6, 4))
    assert cuts(TokenBatch.pack([[1, 2, 3]])) == ([0, 1], (3,))


def test_a_budget_above_that_of_a_batch_is_refused_by_name():
    with pytest.raises(ValueError, match="interactive_tokens 9 must be at most max_tokens 8"):
        BatchConfig(max_tokens=8, interactive_tokens=9)
    assert BatchConfig(max_tokens=8).small_tokens == 1 and BatchConfig().small_tokens == 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("lane") / "model")
    return load(TransformersBackend(model=str(folder), device="cpu", dtype="float32"), deterministic=False)


def test_the_prompt_of_all_completions_of_a_call_is_computed_once(model):
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, 300, 80).tolist()
    completions = [rng.integers(3, 300, 20 + g).tolist() for g in range(8)]
    wanted = [[False] * 79 + [True] * len(c) + [False] for c in completions]
    batch = TokenBatch.pack([[*prompt, *completion] for completion in completions], wanted)
    spec = spec_of("hidden", 300, check="sampled")
    before = model.computed_tokens
    ((_, together),) = model.begin_each([(batch, spec)])()
    assert model.computed_tokens - before == 80 + sum(map(len, completions))
    before = model.computed_tokens  # and so in jobs of their own, as long as they share a pass
    apart = dict(model.begin_each([(batch.select([g]), spec) for g in range(8)])())
    assert model.computed_tokens - before == 80 + sum(map(len, completions))
    each = np.concatenate([apart[g]["hidden_ND"].array for g in range(8)])
    torch.testing.assert_close(torch.from_numpy(each.copy()), torch.from_numpy(together["hidden_ND"].array.copy()))


def test_answers_one_by_one_are_those_of_the_batch(model):
    batches = [TokenBatch.pack([[5, 6, 7, 8, 9]]), TokenBatch.pack([[9, 8, 7], [6, 5, 4, 3]])]
    jobs = [(batch, spec_of("top_k", 300, k=5)) for batch in batches]
    whole, each = model.score(jobs), list(model.begin_each(jobs)())
    assert [place for place, _ in each] == [0, 1]
    for signals, (_, found) in zip(whole, each, strict=True):
        np.testing.assert_allclose(found["topk_logits_NK"].array, signals["topk_logits_NK"].array, rtol=1e-5, atol=1e-6)
    assert each[-1][1].timing.batch_tokens == 12 and whole[0].timing.forward_us > 0
