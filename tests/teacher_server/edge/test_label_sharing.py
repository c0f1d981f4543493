"""Computed once: what is stored or under way costs no forward pass, and everybody gets the same bytes."""

import asyncio
import threading
from dataclasses import replace

import numpy as np
import pytest

from teacher_server.config.server import TenantConfig
from teacher_server.edge.admission import Admission
from teacher_server.edge.label_sharing import LabelSharing
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import OverloadedError, ServerError
from teacher_wire.core.tensor import float32
from teacher_wire.generate.messages import GenerateCall, PromptBatch, Sample, SamplingSpec
from teacher_wire.labels.store import LabelStore
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher

SPEC = spec_of("top_k", 64, k=4)


class Teacher(FakeTeacher):
    """Every call differs in the last bits, as floating-point work in other company does; may be held or told to fail."""

    def __post_init__(self):
        super().__post_init__()
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures = []
        self.started = self.ended = 0

    async def score(self, call):
        self.started += 1
        try:
            await self.gate.wait()
            if self.failures:
                raise self.failures.pop(0)
            signals = await super().score(call)
        finally:
            self.ended += 1
        lse_N = float32(signals.lse_N.array + np.float32(1e-5) * self.calls)
        return replace(signals, tensors=signals.tensors | {"lse_N": lse_N})


def sharing(teacher, folder=None, memory_bytes=1 << 20, admission=None):
    store = LabelStore(folder) if folder else None
    return LabelSharing(teacher, admission or Admission(), memory_bytes=memory_bytes, store=store)


def call_of(teacher, *sequences, tenant="", wanted=None, spec=SPEC):
    batch = TokenBatch.pack([list(sequence) for sequence in sequences], wanted)
    return ScoreCall("r", "fake", teacher.teacher_info().fingerprint, spec, batch, tenant=tenant)


def rows(signals, call, sequence):
    bounds = call.batch.row_bounds_B1
    return {
        name: tensor.array[bounds[sequence] : bounds[sequence + 1]].tobytes()
        for name, tensor in signals.tensors.items()
    }


A, B, C, D = (1, 2, 3, 4), (5, 6, 7), (8, 9, 10, 11, 12), (13, 14)


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_only_new_sequences_are_computed_and_all_get_the_same_bytes():
    teacher = Teacher()
    shared = sharing(teacher)
    first, second = call_of(teacher, A, B, C), call_of(teacher, C, D, A)
    one, two = await shared.score(first), await shared.score(second)
    assert teacher.tokens == len(A) + len(B) + len(C) + len(D)
    assert rows(one, first, 0) == rows(two, second, 2)
    assert rows(one, first, 2) == rows(two, second, 0)
    assert two.rows == second.batch.rows and two.fingerprint == teacher.teacher_info().fingerprint
    assert (shared.stats.computed, shared.stats.memory_hits) == (4, 2)


async def test_requests_at_the_same_time_cost_one_forward():
    teacher = Teacher()
    teacher.gate.clear()
    shared = sharing(teacher, memory_bytes=0)
    calls = [call_of(teacher, A, B), call_of(teacher, B, C), call_of(teacher, C, A), call_of(teacher, B)]
    tasks = [asyncio.create_task(shared.score(call)) for call in calls]
    await until(lambda: teacher.started == 2)
    teacher.gate.set()
    answers = await asyncio.gather(*tasks)
    assert teacher.tokens == len(A) + len(B) + len(C)
    assert rows(answers[0], calls[0], 1) == rows(answers[1], calls[1], 0) == rows(answers[3], calls[3], 0)
    assert rows(answers[1], calls[1], 1) == rows(answers[2], calls[2], 0)
    assert shared.stats.joined == 4 and shared.counters()["flights"] == 0


async def test_one_sequence_twice_in_a_request_is_computed_once():
    teacher = Teacher()
    call = call_of(teacher, A, B, A)
    answer = await sharing(teacher).score(call)
    assert teacher.tokens == len(A) + len(B)
    assert rows(answer, call, 0) == rows(answer, call, 2)


async def test_a_sequence_without_a_wanted_row_costs_nothing():
    teacher = Teacher()
    call = call_of(teacher, A, B, wanted=[[True, True, True, False], [False] * 3])
    answer = await sharing(teacher).score(call)
    assert answer.rows == 3 and teacher.tokens == len(A)


@pytest.mark.parametrize("other", ["spec", "wanted", "fingerprint"])
async def test_what_was_asked_otherwise_is_not_shared(other):
    teacher = Teacher()
    shared = sharing(teacher)
    call = call_of(teacher, A)
    changed = {
        "spec": replace(call, spec=spec_of("top_k", 64, k=5)),
        "wanted": call_of(teacher, A, wanted=[[True, False, True, False]]),
        "fingerprint": replace(call, fingerprint="other"),
    }[other]
    await shared.score(call)
    await shared.score(changed)
    assert teacher.calls == 2


async def test_labels_checked_in_every_row_serve_where_a_sample_is_asked_for():
    """In memory as on disk; and never the other way round."""
    teacher = FakeTeacher()
    shared = sharing(teacher)
    every, some = (spec_of("hidden", 64, check) for check in ("all", "sampled"))
    known = await shared.score(call_of(teacher, A, C, spec=every))
    call = call_of(teacher, B, C, A, spec=some)
    answer = await shared.score(call)
    assert (teacher.calls, shared.stats.memory_hits) == (2, 2), "only B was computed"
    np.testing.assert_array_equal(answer["hidden_ND"].array[2:], np.roll(known["hidden_ND"].array, 4, axis=0))
    expected = teacher.signals(some, call.batch)
    assert answer.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(answer[name].array, tensor.array)
    await shared.score(call_of(teacher, B, spec=every))
    assert teacher.calls == 3


async def test_a_waiter_outlives_the_one_who_asked_first():
    teacher = Teacher()
    teacher.gate.clear()
    shared = sharing(teacher)
    first = asyncio.create_task(shared.score(call_of(teacher, A)))
    await until(lambda: teacher.started == 1)
    second = asyncio.create_task(shared.score(call_of(teacher, A)))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    teacher.gate.set()
    assert (await second).rows == 3
    assert teacher.calls == 1


async def test_work_that_nobody_waits_for_is_taken_back():
    teacher = Teacher()
    teacher.gate.clear()
    shared = sharing(teacher)
    tasks = [asyncio.create_task(shared.score(call_of(teacher, A, B))) for _ in range(3)]
    await until(lambda: teacher.started == 1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: teacher.ended == 1)
    assert teacher.calls == 0 and shared.counters()["flights"] == 0
    teacher.gate.set()
    assert (await shared.score(call_of(teacher, A, B))).rows == 5


async def test_anothers_failure_is_not_ours():
    teacher = Teacher()
    teacher.gate.clear()
    teacher.failures = [ServerError("the first one's bad luck")]
    shared = sharing(teacher)
    first = asyncio.create_task(shared.score(call_of(teacher, A)))
    await until(lambda: teacher.started == 1)
    second = asyncio.create_task(shared.score(call_of(teacher, A, B)))
    await until(lambda: teacher.started == 2)
    teacher.gate.set()
    with pytest.raises(ServerError):
        await first
    assert (await second).rows == 5


async def test_the_memory_keeps_the_newest_within_its_budget():
    teacher = Teacher()
    shared = sharing(teacher, memory_bytes=250)
    for sequence in (A, B, C, D, D):
        await shared.score(call_of(teacher, sequence))
    assert 0 < shared.counters()["memory_bytes"] <= 250
    assert teacher.calls == 4  # the newest is still there
    await shared.score(call_of(teacher, A))
    assert teacher.calls == 5  # the oldest is not


async def test_a_folder_serves_every_server_that_sees_it(tmp_path):
    teacher = Teacher()
    call = call_of(teacher, A, B, C)
    made = await sharing(teacher, tmp_path).score(call)
    later = sharing(teacher, tmp_path, memory_bytes=0)
    again = await later.score(call)
    assert teacher.calls == 1 and later.stats.disk_hits == 3
    assert [rows(made, call, i) for i in range(3)] == [rows(again, call, i) for i in range(3)]


async def test_stored_labels_cost_no_tokens():
    now_s = [0.0]
    admission = Admission(lambda: now_s[0])
    admission.configure({"t": TenantConfig(tokens_per_s=1)})
    teacher = Teacher()
    shared = sharing(teacher, admission=admission)
    await shared.score(call_of(teacher, A, tenant="t"))
    assert (await shared.score(call_of(teacher, A, tenant="t"))).rows == 3
    with pytest.raises(OverloadedError) as caught:
        await shared.score(call_of(teacher, B, tenant="t"))
    assert caught.value.field == "tenants.t.tokens_per_s" and caught.value.retry_after_s > 0
    assert (await shared.score(call_of(teacher, B, tenant="u"))).rows == 2
    now_s[0] += caught.value.retry_after_s + 1e-6
    assert (await shared.score(call_of(teacher, C, tenant="t"))).rows == 4


async def test_labels_carry_the_fingerprint_of_who_computed_them_and_foreign_ones_are_nobodys(tmp_path):
    """Else the student's own check of it would be dead behind an edge."""
    teacher = Teacher(mistake="foreign")
    for shared in (sharing(teacher), sharing(teacher, tmp_path)):
        call = call_of(teacher, A, B)
        answer = await shared.score(call)
        assert answer.fingerprint == "0" * 64
        joined = await asyncio.gather(shared.score(call_of(teacher, A, C)), shared.score(call_of(teacher, C, D, A)))
        assert {answer.fingerprint for answer in joined} == {"0" * 64}
        assert shared.counters()["memory_bytes"] == 0
        teacher.mistake = ""
        right = await shared.score(call)
        assert right.fingerprint == call.fingerprint
        teacher.mistake = "foreign"
        mixed = await shared.score(call_of(teacher, A, D))  # A is kept, D is computed by another one
        assert mixed.fingerprint == "0" * 64
        assert (await shared.score(call)).fingerprint == call.fingerprint
    assert not list(tmp_path.rglob("*foreign*")) and len(list(tmp_path.rglob("*.safetensors"))) == 2


async def test_an_answers_labels_are_written_side_by_side(tmp_path):
    together = threading.Barrier(4)

    class Slow(LabelStore):
        def keep(self, *arguments):
            together.wait(20)  # for as many as the answer has sequences
            return super().keep(*arguments)

    teacher = Teacher()
    shared = LabelSharing(teacher, Admission(), memory_bytes=0, store=Slow(tmp_path))
    call = call_of(teacher, A, B, C, D)
    answer = await shared.score(call)
    assert answer.rows == call.batch.rows and not together.broken


class Writer(FakeTeacher):
    """Writes three tokens a sample, and waits before each."""

    async def generate(self, call):
        for prompt, index in call.wanted():
            await asyncio.sleep(0)
            yield Sample(prompt, index, np.ones(3, np.int32), np.zeros(3, np.float32), "stop")


def writing(tenant="t", have=()):
    spec = SamplingSpec(samples=2, max_new_tokens=1_000)
    return GenerateCall("", "", spec, PromptBatch.pack([[1, 2], [3, 4, 5]]), frozenset(have), tenant=tenant)


async def test_a_call_of_generate_pays_for_what_may_be_written_and_gets_back_what_was_not():
    now_s = [0.0]
    admission = Admission(lambda: now_s[0])
    admission.configure({"t": TenantConfig(tokens_per_s=100)})
    shared = sharing(Writer(), admission=admission)
    samples = shared.generate(writing())
    await anext(samples)
    for _ in range(51):
        with pytest.raises(OverloadedError):
            await anext(shared.generate(writing()))
    assert len([sample async for sample in samples]) == 3
    assert admission.counters()["t"]["computed_tokens"] == 5 + 4 * 3
    assert len([sample async for sample in shared.generate(writing(have=[(0, 0), (0, 1), (1, 0)]))]) == 1
    assert admission.counters()["t"]["computed_tokens"] == 17 + 3 + 3  # of the prompt that was gone on with
    assert admission.counters()["t"]["inflight_tokens"] == 0
