"""An edge that goes down: everything it has taken is sent, however slowly it is read, or the student is told at once."""

import asyncio
import contextlib
import time

import grpc
import numpy as np
import pytest

from teacher_server.config.server import EdgeConfig
from teacher_server.edge.server import EdgeServer
from teacher_wire import PROTOCOL
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import UnavailableError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.generate.codec import encode_generate
from teacher_wire.generate.messages import GenerateCall, PromptBatch, Sample, SamplingSpec
from teacher_wire.score import codec
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.transport.channel import CLIENT_OPTIONS
from teacher_wire.v2 import teacher_pb2 as pb
from teacher_wire.v2 import teacher_pb2_grpc as pb_grpc
from tests.e2e.conftest import free_port

FULL = spec_of("full", 1500)
ROWS, REQUESTS = 959, 8  # of 6 KB each: 46 MB in all


@contextlib.asynccontextmanager
async def edge(teacher, drain_s, **changes):
    server = EdgeServer(EdgeConfig(port=free_port(), drain_s=drain_s, **changes), teacher)
    await server.start()
    try:
        yield server
    finally:
        await server.drain()


@contextlib.asynccontextmanager
async def stream_of(server, info, requests=REQUESTS):
    """A Score stream below the client, which would read on by itself; all its requests are sent."""
    async with grpc.aio.insecure_channel(server.address, options=CLIENT_OPTIONS) as channel:
        call = pb_grpc.TeacherStub(channel).Score()
        await call.write(pb.ScoreUp(open=pb.Open(protocol=PROTOCOL, window_bytes=128 << 20)))
        for number in range(requests):
            batch = TokenBatch.pack([[(number + i) % 1500 for i in range(ROWS + 1)]])
            request = codec.encode_call(ScoreCall(f"r{number}", info.name, info.fingerprint, FULL, batch))
            await call.write(pb.ScoreUp(request=request))
        yield call
        call.cancel()


async def read(call, pause_s=0.0, stop_after=None):
    """(payload bytes, whole requests, the code of the end) of what comes."""
    payload, done = 0, 0
    try:
        while (down := await call.read()) is not grpc.aio.EOF:
            kind = down.WhichOneof("message")
            payload += codec.payload_bytes(down.chunk) if kind == "chunk" else 0
            done += kind == "done"
            assert kind != "failed", down.failed
            if stop_after is not None and done >= stop_after:
                return payload, done, None
            await asyncio.sleep(pause_s if kind == "chunk" else 0)
    except grpc.aio.AioRpcError:
        pass
    return payload, done, await call.code()


@pytest.fixture(scope="module")
def teacher():
    return FakeTeacher(vocab_rows=1500, hidden_size=8, max_reply_bytes=64 << 20)


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_all_that_is_under_way_reaches_a_slow_reader(teacher):
    async with edge(teacher, drain_s=60) as server, stream_of(server, teacher.teacher_info()) as call:
        first, done, _ = await read(call, stop_after=1)  # and now it is slow
        await until(lambda: server.counters()["open_requests"] == 0)
        draining = asyncio.create_task(server.drain())
        rest, more, code = await read(call, pause_s=0.02)
        await draining
        assert done + more == REQUESTS
        assert first + rest == REQUESTS * ROWS * FULL.row_bytes(8, 4)
        assert code == grpc.StatusCode.UNAVAILABLE
        assert server.counters()["held"] == {**server.counters()["held"], "open_calls": 0, "reply_bytes": 0}


async def test_a_reader_too_slow_for_the_drain_is_told_within_it(teacher):
    async with edge(teacher, drain_s=1) as server, stream_of(server, teacher.teacher_info()) as call:
        await read(call, stop_after=1)
        await until(lambda: server.counters()["open_requests"] == 0)
        began_s = time.monotonic()
        await server.drain()
        assert time.monotonic() - began_s >= 1  # it did wait
        _, done, code = await read(call)
        assert done < REQUESTS and code == grpc.StatusCode.UNAVAILABLE


async def test_an_idle_student_does_not_hold_up_a_drain(teacher):
    async with edge(teacher, drain_s=600) as server, TeacherClient(server.address, retry_for_s=0) as client:
        info = await client.teacher()
        await client.score(info, spec_of("top_k", 64, k=4), TokenBatch.pack([[1, 2, 3]]))
        async with asyncio.timeout(30):
            await server.drain()
        with pytest.raises(UnavailableError):
            await client.score(info, spec_of("top_k", 64, k=4), TokenBatch.pack([[1, 2, 4]]))


async def test_what_is_being_computed_is_finished_and_what_comes_later_is_refused(teacher):
    slow = FakeTeacher(vocab_rows=64, delay_s=0.5)
    async with edge(slow, drain_s=60) as server:
        clients = [TeacherClient(server.address, retry_for_s=0) for _ in range(2)]
        info = await clients[0].teacher()
        spec = spec_of("top_k", 64, k=4)
        early = asyncio.create_task(clients[0].score(info, spec, TokenBatch.pack([[1, 2, 3]])))
        await until(lambda: server.counters()["open_requests"] == 1)
        draining = asyncio.create_task(server.drain())
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError):
            await clients[1].score(info, spec, TokenBatch.pack([[1, 2, 4]]))
        assert (await early).rows == 2
        await draining
        for client in clients:
            await client.close()


class Writer(FakeTeacher):
    """Long samples, as many as asked, without any time."""

    async def generate(self, call: GenerateCall):
        for prompt, index in call.wanted():
            ids_n = np.ones(call.spec.max_new_tokens, np.int32)
            yield Sample(prompt, index, ids_n, np.zeros(len(ids_n), np.float32), "length")


async def test_generate_and_head_are_sent_to_their_end(teacher):
    writer = Writer(vocab_rows=300_000, hidden_size=8)
    async with (
        edge(writer, drain_s=60) as server,
        grpc.aio.insecure_channel(server.address, options=CLIENT_OPTIONS) as channel,
    ):
        info, stub = writer.teacher_info(), pb_grpc.TeacherStub(channel)
        spec = SamplingSpec(samples=info.limits.max_samples, max_new_tokens=2000)
        prompts = PromptBatch.pack([[1]] * 8)
        calls = [
            stub.Generate(encode_generate(GenerateCall(info.name, "", spec, prompts))),
            stub.Artifact(
                pb.ArtifactRequest(teacher=info.name, kind="output_head", sha256=info.artifact("output_head").sha256)
            ),
        ]
        firsts = [await call.read() for call in calls]
        assert firsts[1].HasField("header")
        draining = asyncio.create_task(server.drain())
        for call in calls:
            while (last := await call.read()) is not grpc.aio.EOF:
                final = last
                await asyncio.sleep(0.001)
            assert await call.code() == grpc.StatusCode.OK
            if final.DESCRIPTOR.name == "GenerateDown":
                assert final.done.samples == spec.samples * 8
            else:
                assert final.offset + len(final.data) == 300_000 * 8 * 4
        await draining
