"""Requests while replicas come, go and hold different weights: handles are fakes, everything else is real."""

import asyncio
from dataclasses import replace

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException

from teacher_server.edge.deployment import ServeTeachers
from teacher_server.reports import News, Plan, TeacherPlan
from teacher_wire import codec
from teacher_wire.errors import MismatchError, NotFoundError, ServerError, UnavailableError
from teacher_wire.fake import FakeTeacher
from teacher_wire.messages import ScoreCall, SignalSpec, TokenBatch

OLD, NEW = FakeTeacher(seed=0), FakeTeacher(seed=1)
SPEC = SignalSpec("full", 64)
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


@pytest.mark.parametrize(
    "problem",
    [RayActorError(), RayServeException("no such application"), TimeoutError("no word"), RuntimeError("no cluster")],
)
async def test_a_handle_that_cannot_be_looked_up_is_unavailable_and_looked_up_again(problem):
    found, problems = Handle(OLD), [problem]

    def find(name):
        if problems:
            raise problems.pop()
        return found

    with pytest.raises(UnavailableError, match="looked up"):
        await ServeTeachers(["fake"], find).info("fake")
    problems.append(problem)
    assert (await ServeTeachers(["fake"], find).score(call(OLD_PRINT))).fingerprint == OLD_PRINT
    assert (await ServeTeachers(["fake"], find).describe())[0].name == "fake"
