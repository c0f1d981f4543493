"""Requests while replicas come, go and hold different weights: handles are fakes, everything else is real."""

import asyncio
import copy
import types
from dataclasses import replace

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException, RequestCancelledError

from teacher_server.edge.router import ServeTeachers
from teacher_server.telemetry.records import News, Plan, TeacherPlan
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import MismatchError, NotFoundError, ServerError, UnavailableError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.generate.messages import GenerateCall, PromptBatch, SamplingSpec, check_generate
from teacher_wire.score import codec
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.fake_tokenizer import FakeTokenizer
from teacher_wire.testing.loopback import serve
from teacher_wire.tokenizing.messages import TextRow, TokenizeCall

OLD, NEW = FakeTeacher(seed=0), FakeTeacher(seed=1)
SPEC = spec_of("full", 64)
OLD_PRINT, NEW_PRINT = OLD.teacher_info().fingerprint, NEW.teacher_info().fingerprint


class Handle:
    """A deployment of fakes. Requests meet `first` unless they ask for the weights of another one by its fingerprint."""

    def __init__(self, *teachers, fingerprint=""):
        self.teachers = list(teachers)
        self.fingerprint = fingerprint
        self.problems = []
        self.asked = []

    def options(self, multiplexed_model_id):
        pinned = Handle(fingerprint=multiplexed_model_id)
        pinned.teachers, pinned.problems, pinned.asked = self.teachers, self.problems, self.asked
        return pinned

    def _met(self):
        self.asked.append(self.fingerprint)
        if self.problems:
            raise self.problems.pop(0)
        return next((t for t in self.teachers if t.teacher_info().fingerprint == self.fingerprint), self.teachers[0])

    class _Method:
        def __init__(self, call):
            self.remote = call

    @property
    def info(self):
        async def call():
            return self._met().teacher_info()

        return self._Method(call)

    @property
    def score(self):
        async def call(asked):
            teacher = self._met()
            codec.check_call(asked, teacher.teacher_info())
            return await teacher.score(asked)

        return self._Method(call)


class ReadingHandle(Handle):
    """Its teachers answer Tokenize too."""

    def options(self, multiplexed_model_id):
        pinned = super().options(multiplexed_model_id)
        pinned.__class__ = ReadingHandle
        return pinned

    @property
    def tokenize(self):
        async def call(asked):
            return await self._met().tokenize(asked)

        return self._Method(call)


def call(fingerprint=""):
    return ScoreCall("r", "fake", fingerprint, SPEC, TokenBatch.pack([[1, 2, 3]]))


def news(*teachers, names=("fake",)):
    infos = tuple(teacher.teacher_info() for teacher in teachers)
    return News(Plan({}, {name: TeacherPlan() for name in names}, True), {"fake": infos} if infos else {}, 1)


def edge_of(handle, for_s=10.0):
    return ServeTeachers(["fake"], lambda name: handle, ask_again_for_s=for_s)


async def test_a_roll_gives_each_student_the_weights_it_asks_for_and_no_failure():
    handle = Handle(NEW, OLD)  # the new replica is idle: every request meets it first
    teachers = edge_of(handle)
    teachers.take(news(OLD))  # and the edge has not heard of it yet
    assert (await teachers.score(call(OLD_PRINT))).fingerprint == OLD_PRINT
    assert handle.asked == ["", OLD_PRINT], "asked again for its weights"
    assert (await teachers.score(call())).fingerprint == NEW_PRINT, "whoever does not care gets either"
    handle.asked.clear()
    teachers.take(news(NEW, OLD))
    answers = await asyncio.gather(*(teachers.score(call(p)) for p in (OLD_PRINT, NEW_PRINT)))
    assert [answer.fingerprint for answer in answers] == [OLD_PRINT, NEW_PRINT]
    assert sorted(handle.asked) == sorted([OLD_PRINT, NEW_PRINT]), "at once"
    assert [info.fingerprint for info in await teachers.describe()] == [NEW_PRINT]
    assert (await teachers.info("fake", OLD_PRINT)).fingerprint == OLD_PRINT


async def test_when_the_last_replica_of_its_weights_is_gone_a_student_is_told():
    handle = Handle(NEW)
    teachers = edge_of(handle)
    teachers.take(news(NEW))
    with pytest.raises(MismatchError):
        await teachers.score(call(OLD_PRINT))
    assert len(handle.asked) == 1
    teachers.take(news(NEW, OLD))  # said to live for a while after it went

    async def forget():
        await asyncio.sleep(0.1)
        teachers.take(news(NEW))

    forgotten = asyncio.create_task(forget())
    with pytest.raises(MismatchError):
        await teachers.score(call(OLD_PRINT))
    await forgotten
    assert len(handle.asked) > 2


async def test_a_replica_that_dies_with_a_request_costs_the_student_nothing():
    handle = Handle(OLD)
    handle.problems = [UnavailableError("killed"), UnavailableError("not up yet")]
    teachers = edge_of(handle)
    assert (await teachers.score(call(OLD_PRINT))).fingerprint == OLD_PRINT
    assert len(handle.asked) == 3


async def test_tokenize_meets_a_replica_of_its_weights_and_outlives_one():
    old, new = (FakeTeacher(vocab_rows=300, seed=seed, reader=FakeTokenizer()) for seed in (0, 1))
    handle = ReadingHandle(new, old)
    handle.problems = [UnavailableError("killed"), RayActorError()]
    teachers = edge_of(handle)
    teachers.take(news(new, old))
    [row] = await teachers.tokenize(TokenizeCall("fake", old.teacher_info().fingerprint, (TextRow(b"cat"),)))
    assert len(row.token_ids_T) == 3 and (old.tokenize_calls, new.tokenize_calls) == (1, 0)
    assert teachers.counters()["latency"]["fake"]["tokenize"]["count"] == 1 and teachers.counters()["retries"] == {
        "fake": 2
    }
    with pytest.raises(MismatchError):
        await teachers.tokenize(TokenizeCall("fake", "0" * 64, (TextRow(b"cat"),)))


async def test_asking_again_ends():
    handle = Handle(OLD)
    handle.problems = [UnavailableError(f"killed {i}") for i in range(1000)]
    with pytest.raises(UnavailableError):
        await edge_of(handle, for_s=0.2).score(call())
    handle.problems = [ServerError("a fault of its own")]
    with pytest.raises(ServerError):
        await edge_of(handle).score(call())


async def test_weights_that_only_another_edge_has_heard_of_are_found():
    handle = Handle(OLD, NEW)
    teachers = edge_of(handle)
    teachers.take(news(OLD))
    assert (await teachers.info("fake", NEW_PRINT)).fingerprint == NEW_PRINT
    assert (await teachers.info("fake", "f" * 64)).fingerprint in (OLD_PRINT, NEW_PRINT), "and check_call refuses"


async def test_teachers_come_and_go_with_the_news_and_a_silent_one_keeps_its_weights():
    handle = Handle(OLD)
    teachers = edge_of(handle)
    teachers.take(news(OLD))
    teachers.take(news())
    assert (await teachers.info("fake")).fingerprint == OLD_PRINT and not handle.asked
    teachers.take(replace(news(), plan=None))
    assert (await teachers.info("")).name == "fake"
    teachers.take(news(names=("other",)))
    with pytest.raises(NotFoundError, match="other"):
        await teachers.score(call())


class Streams:
    """A deployment of writers, as a streaming handle. `troubles` end calls after so many samples, one call each."""

    def __init__(self, *teachers):
        self.teachers = list(teachers)
        self.troubles = []
        self.asked = []
        self.cancelled = 0

    def options(self, multiplexed_model_id="", stream=False):
        pinned = copy.copy(self)
        pinned.fingerprint = multiplexed_model_id or getattr(self, "fingerprint", "")
        pinned.root = getattr(self, "root", self)
        return pinned

    @property
    def generate(self):
        return types.SimpleNamespace(remote=self._generate)

    @property
    def info(self):
        async def call():
            return self._met().teacher_info()

        return types.SimpleNamespace(remote=call)

    def _met(self):
        wanted, teachers = getattr(self, "fingerprint", ""), getattr(self, "root", self).teachers
        return next((t for t in teachers if t.teacher_info().fingerprint == wanted), teachers[0])

    def _generate(self, asked):
        root, wanted = self.root, getattr(self, "fingerprint", "")
        root.asked.append((wanted, len(asked.have)))
        teacher = self._met()
        after, trouble = root.troubles.pop(0) if root.troubles else (10**9, None)

        async def samples():
            check_generate(asked, teacher.teacher_info())
            made = 0
            async for sample in teacher.writer.samples(asked, 64):
                if made == after:
                    break
                made += 1
                yield sample
            if trouble is not None:
                raise trouble

        return _Iterated(samples(), root)


def asked_of(fingerprint, samples=4):
    return GenerateCall(
        "fake", fingerprint, SamplingSpec(samples=samples, max_new_tokens=3), PromptBatch.pack([[1], [2]])
    )


async def written(teachers, call):
    found = [sample async for sample in teachers.generate(call)]
    return sorted((s.prompt, s.index, tuple(s.token_ids_n)) for s in found)


async def test_a_call_that_loses_its_replica_goes_on_at_another_one_and_nothing_comes_twice():
    handle = Streams(OLD)
    teachers = edge_of(handle)
    teachers.take(news(OLD))
    whole = await written(teachers, asked_of(OLD_PRINT))
    handle.asked.clear()
    handle.troubles = [
        (3, UnavailableError("killed")),
        (0, RayActorError()),
        (2, asyncio.CancelledError()),
        (1, RequestCancelledError("id")),
        (0, None),
    ]
    assert await written(teachers, asked_of(OLD_PRINT)) == whole and len(whole) == 8
    assert [have for _, have in handle.asked] == [0, 3, 3, 5, 6, 6]
    assert teachers.counters()["retries"] == {"fake": 5}
    latency = teachers.counters()["latency"]["fake"]
    assert latency["whole"]["count"] == latency["first_chunk"]["count"] == 2
    handle.troubles = [(8, UnavailableError("killed behind the last"))]
    assert await written(teachers, asked_of(OLD_PRINT)) == whole, "it was all there"


async def test_a_roll_gives_each_call_the_weights_it_asks_for():
    handle = Streams(NEW, OLD)
    teachers = edge_of(handle)
    teachers.take(news(OLD))
    assert len(await written(teachers, asked_of(OLD_PRINT))) == 8
    assert [fingerprint for fingerprint, _ in handle.asked] == ["", OLD_PRINT]
    teachers.take(news(NEW, OLD))
    handle.asked.clear()
    handle.troubles = [(3, UnavailableError("killed"))]
    assert len(await written(teachers, asked_of(""))) == 8
    assert handle.asked == [(NEW_PRINT, 0), (NEW_PRINT, 3)], "one fingerprint, whoever names none"
    teachers.take(news(NEW))
    with pytest.raises(MismatchError):
        await written(teachers, asked_of(OLD_PRINT))


async def test_during_a_roll_a_call_over_the_wire_is_checked_against_the_weights_it_names():
    """It was against the newest: students of the old ones, which still lived, were refused with MismatchError."""
    handle = Streams(NEW, OLD)
    teachers = edge_of(handle)
    teachers.take(news(NEW, OLD))
    with serve(teachers) as server:
        async with TeacherClient(server.address, retry_for_s=0) as client:
            for info in (OLD.teacher_info(), NEW.teacher_info()):
                spec, prompts = SamplingSpec(samples=4, max_new_tokens=3), PromptBatch.pack([[1], [2]])
                assert len([sample async for sample in client.generate(info, spec, prompts)]) == 8
            teachers.take(news(NEW))
            handle.teachers.remove(OLD)
            with pytest.raises(MismatchError):
                async for _ in client.generate(OLD.teacher_info(), spec, prompts):
                    pass
    assert {fingerprint for fingerprint, _ in handle.asked} >= {OLD_PRINT, NEW_PRINT}


async def test_a_lost_replica_or_a_word_of_rays_own_costs_no_call_over_the_wire():
    """A CancelledError that is not ours left the call without a status: the student waited for ever."""
    handle = Streams(OLD)
    teachers = edge_of(handle)
    teachers.take(news(OLD))
    handle.troubles = [(2, asyncio.CancelledError()), (1, UnavailableError("killed")), (0, RayActorError())]
    with serve(teachers) as server:
        async with TeacherClient(server.address, retry_for_s=0) as client:
            spec, prompts = SamplingSpec(samples=4, max_new_tokens=3), PromptBatch.pack([[1], [2]])
            async with asyncio.timeout(60):
                found = [sample async for sample in client.generate(OLD.teacher_info(), spec, prompts)]
    assert len({(sample.prompt, sample.index) for sample in found}) == len(found) == 8


async def test_faults_of_a_call_end_it_and_closing_it_cancels_the_replicas_work():
    handle = Streams(OLD)
    teachers = edge_of(handle)
    teachers.take(news(OLD))
    handle.troubles = [(1, ServerError("a fault of its own"))]
    with pytest.raises(ServerError):
        await written(teachers, asked_of(""))
    handle.cancelled = 0
    samples = teachers.generate(asked_of(OLD_PRINT))
    await anext(samples)
    await samples.aclose()
    assert handle.cancelled == 1
    handle.troubles = [(0, UnavailableError("again"))] * 1000
    with pytest.raises(UnavailableError):
        await written(edge_of(handle, for_s=0.2), asked_of(OLD_PRINT))


async def test_our_own_cancellation_stays_one():
    class Endless(Streams):
        def _generate(self, asked):
            async def samples():
                await asyncio.sleep(60)
                yield

            return _Iterated(samples(), self.root)

    handle = Endless(OLD)
    teachers = edge_of(handle)
    teachers.take(news(OLD))
    task = asyncio.create_task(written(teachers, asked_of(OLD_PRINT)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handle.cancelled == 1


class _Iterated:
    def __init__(self, stream, root):
        self.stream, self.root = stream, root

    def __aiter__(self):
        return self.stream

    def cancel(self):
        self.root.cancelled += 1


@pytest.mark.parametrize(
    "trouble", [ValueError("no such app"), KeyError("x"), RayServeException("gone"), RayActorError()]
)
async def test_a_deployment_that_serve_does_not_know_yet_is_waited_for(trouble):
    handle, troubles = Handle(OLD), [trouble, trouble]

    def find(name):
        if troubles:
            raise troubles.pop()
        return handle

    teachers = ServeTeachers(["fake"], find)
    assert (await teachers.score(call(OLD_PRINT))).fingerprint == OLD_PRINT
    with pytest.raises(UnavailableError, match="not deployed"):
        await ServeTeachers(["fake"], lambda name: (_ for _ in ()).throw(trouble), ask_again_for_s=0).score(call())
