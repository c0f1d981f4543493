"""A server that takes a call and never answers it: noticed by the student, tried again, and named at last."""

import asyncio

import numpy as np
import pytest

from student_trainer.config.teachers import TeacherConfig
from student_trainer.teachers.connect import Connection
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import DeadlineError, LimitError, UnavailableError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.generate.messages import PromptBatch, SamplingSpec
from teacher_wire.score import codec
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from tests.tiny import fetched_head

QUICK = (0.01, 0.02)
SPEC = spec_of("full", 64)
BATCH = TokenBatch.pack([[1, 2, 3], [4, 5, 6, 7, 8]])


class Silent(FakeTeacher):
    """Takes its first `lost` calls of every kind and never answers them."""

    lost = 1
    heard = 0
    deadlines: tuple[float, ...] = ()

    async def _maybe_lose(self):
        self.heard += 1
        if self.heard <= self.lost:
            await asyncio.Event().wait()

    async def score(self, call):
        self.deadlines = (*self.deadlines, call.timeout_s)
        await self._maybe_lose()
        return await super().score(call)

    async def artifact_bytes(self, *args):
        await self._maybe_lose()
        return await super().artifact_bytes(*args)

    async def generate(self, call):
        await self._maybe_lose()
        async for sample in super().generate(call):
            yield sample


def client_of(server, **options):
    return TeacherClient(
        server.address, **{"backoff_s": QUICK, "answer_s": 0.3, "on_trouble": lambda error: None, **options}
    )


@pytest.fixture(params=["told the deadline", "deaf to it"])
def deaf(request, monkeypatch):
    """Whether the server keeps the deadline that it was told: the student must notice both."""
    if request.param == "deaf to it":
        encode = codec.encode_call

        def untold(call):
            request = encode(call)
            request.timeout_ms = 0
            return request

        monkeypatch.setattr(codec, "encode_call", untold)
    return request.param


async def test_a_lost_score_is_asked_again(deaf):
    fake, told = Silent(), []
    with serve(fake) as server:
        async with client_of(server, on_trouble=told.append) as client:
            signals = await client.score(await client.teacher(), SPEC, BATCH)
    np.testing.assert_array_equal(signals["logits_NV"].array, fake.signals(SPEC, BATCH)["logits_NV"].array)
    assert fake.heard >= 2 and told
    if deaf == "deaf to it":
        assert "no answer came" in str(told[0]) and "teacher.answer_s, value=0.3" in str(told[0])
    else:
        assert fake.deadlines[0] == pytest.approx(0.3)


async def test_a_server_that_never_answers_is_named(deaf):
    fake = Silent()
    fake.lost = 10**9
    with serve(fake) as server:
        async with client_of(server, retry_for_s=0.5) as client:
            with pytest.raises((UnavailableError, DeadlineError)):
                await client.score(await client.teacher(), SPEC, BATCH)
            assert not client.open_requests


async def test_others_get_their_answers_meanwhile(deaf):
    fake = Silent()
    with serve(fake) as server:
        async with client_of(server) as client:
            info = await client.teacher()
            answers = await asyncio.gather(*(client.score(info, SPEC, BATCH) for _ in range(5)))
    assert len(answers) == 5


async def test_a_deadline_of_the_callers_own_is_not_tried_again():
    fake = Silent()
    with serve(fake) as server:
        async with client_of(server) as client:
            with pytest.raises(DeadlineError):
                await client.score(await client.teacher(), SPEC, BATCH, timeout_s=0.2)
    assert fake.heard == 1


async def test_patience_counts_from_the_last_chunk_and_infinity_is_patient():
    fake = FakeTeacher(delay_s=0.5)
    with serve(fake) as server:
        async with TeacherClient(server.address) as client:
            info = await client.teacher()
            assert (await client.score(info, SPEC, BATCH)).rows == BATCH.rows
    assert fake.calls == 1


async def test_a_lost_head_is_fetched_again():
    fake = Silent()
    with serve(fake) as server:
        async with client_of(server) as client:
            head = await fetched_head(client, await client.teacher())
    np.testing.assert_array_equal(head.weight_VD.array, fake.weight_VD)
    fake.heard, fake.lost = 0, 10**9
    with serve(fake) as server:
        async with client_of(server, retry_for_s=0.5) as client:
            with pytest.raises(UnavailableError, match="no answer came"):
                await fetched_head(client, await client.teacher())


async def test_lost_writing_is_asked_again():
    fake = Silent()
    with serve(fake) as server:
        async with client_of(server) as client:
            info = await client.teacher()
            spec = SamplingSpec(samples=2, max_new_tokens=4)
            samples = [sample async for sample in client.generate(info, spec, PromptBatch.pack([[1, 2], [3, 4]]))]
    assert len(samples) == 4 and fake.heard == 2


async def test_the_setting_arrives():
    settings = TeacherConfig(address="127.0.0.1:1", answer_s=7)
    async with Connection.of(settings, "127.0.0.1:1").client(lambda error: None) as client:
        assert client._answer_s == 7
    assert TeacherConfig(address="a:1").answer_s == 600


async def test_a_window_too_small_names_value_and_limit_the_right_way_round():
    fake = FakeTeacher()
    with serve(fake) as server:
        async with TeacherClient(server.address, window_bytes=100) as client:
            with pytest.raises(LimitError) as caught:
                await client.score(await client.teacher(), SPEC, BATCH)
    assert caught.value.limit == "100" and int(caught.value.value) > 100
