"""The edge over real gRPC, with a fake teacher behind it: who pays, who waits, who is let in."""

import asyncio
import contextlib
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from teacher_server.config.server import EdgeConfig, TenantConfig
from teacher_server.edge.server import SERVICE, EdgeServer
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import ForbiddenError, OverloadedError, RequestError, ServerError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.transport.channel import Credentials
from tests.e2e.conftest import free_port

SPEC = spec_of("top_k", 64, k=4)
TOKEN_A, TOKEN_B = "a" * 20, "b" * 20


@contextlib.asynccontextmanager
async def edge(teacher=None, **changes):
    server = EdgeServer(EdgeConfig(port=free_port(), drain_s=0, **changes), teacher or FakeTeacher())
    await server.start()
    try:
        yield server
    finally:
        await server.drain()


def client_of(server, **changes):
    return TeacherClient(server.address, credentials=Credentials(**changes), retry_for_s=20)


def batch(first, length=8):
    return TokenBatch.pack([[(first * 7 + i * (first % 5 + 1)) % 64 for i in range(length)]])


async def test_a_student_names_its_tenant():
    async with edge() as server, client_of(server, tenant="lab.one") as client:
        await client.score(await client.teacher(), SPEC, batch(1))
        assert server.counters()["tenants"]["lab.one"]["computed_tokens"] == 8


async def test_a_name_that_is_none_is_refused():
    async with edge() as server, client_of(server, tenant="no/name") as client:
        with pytest.raises(RequestError) as caught:
            await client.score(await client.teacher(), SPEC, batch(1))
        assert caught.value.field == "tenant"


async def test_a_token_is_one_tenants(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text(f"alice {TOKEN_A}\nbob {TOKEN_B}\n")
    async with edge(tokens_file=tokens) as server:
        for credentials in ({"token": TOKEN_A}, {"token": TOKEN_B, "tenant": "bob"}):
            async with client_of(server, **credentials) as client:
                await client.score(await client.teacher(), SPEC, batch(len(credentials)))
        assert set(server.counters()["tenants"]) == {"alice", "bob"}
        async with client_of(server, token=TOKEN_A, tenant="bob") as client:
            with pytest.raises(ForbiddenError) as caught:
                await client.describe()
            assert caught.value.field == "tenant"


async def test_a_student_over_its_quota_waits_as_told_and_says_so():
    told = []
    async with edge() as server:
        server.set_tenants({"slow": TenantConfig(tokens_per_s=200)})
        credentials = Credentials(tenant="slow")
        client = TeacherClient(server.address, credentials=credentials, retry_for_s=20, on_trouble=told.append)
        async with client:
            info = await client.teacher()
            began_s = time.monotonic()
            answers = await asyncio.gather(*(client.score(info, SPEC, batch(i, 20)) for i in range(20)))
            took_s = time.monotonic() - began_s
        assert [answer.rows for answer in answers] == [19] * 20
        assert took_s > (400 - 100 - 20) / 200 * 0.95  # what is not in the bucket, nor overdrawn
        assert {type(error) for error in told} == {OverloadedError}
        assert told[0].field == "tenants.slow.tokens_per_s" and told[0].retry_after_s > 0
        assert len(told) < 60  # not twenty requests again and again
        assert server.counters()["tenants"]["slow"]["computed_tokens"] == 400


async def test_answers_that_never_came_are_no_bytes_sent_and_cost_none():
    """They were counted, and charged, before any work; a request asked again was so at every try."""

    class Failing(FakeTeacher):
        async def score(self, call):
            if call.batch.token_ids_T[0] < 60:
                raise ServerError("a fault")
            return await super().score(call)

    async with edge(Failing()) as server:
        server.set_tenants({"t": TenantConfig(bytes_per_s=500)})
        size = 7 * SPEC.row_bytes(16, 4)
        async with client_of(server, tenant="t") as client:
            info = await client.teacher()
            for number in range(10):
                with pytest.raises(ServerError):
                    await client.score(info, SPEC, TokenBatch.pack([[number] * 8]))
            assert server.counters()["tenants"].get("t", {"sent_bytes": 0})["sent_bytes"] == 0
            await client.score(info, SPEC, TokenBatch.pack([[60] * 8]))
            tenant = server.counters()["tenants"]["t"]
        assert tenant["sent_bytes"] == size and tenant["refused"] == 0


async def test_quotas_change_while_students_wait():
    async with edge() as server:
        server.set_tenants({"t": TenantConfig(tokens_per_s=1)})
        async with client_of(server, tenant="t") as client:
            info = await client.teacher()
            await client.score(info, SPEC, batch(1))  # overdrawn: the next would take seconds
            waiting = asyncio.create_task(client.score(info, SPEC, batch(2)))
            while not server.counters()["tenants"]["t"]["refused"]:
                await asyncio.sleep(0.01)
            server.set_tenants({})
            async with asyncio.timeout(15):
                assert (await waiting).rows == 7


async def test_a_client_that_says_nothing_any_more_is_dropped_with_its_work():
    """A peer behind a black hole: TCP stays open, pings are not answered."""
    teacher = FakeTeacher(delay_s=60)
    async with edge(teacher, keepalive_s=1, keepalive_timeout_s=1) as server:
        hole = _BlackHole(server.address)
        await hole.start()
        client = TeacherClient(hole.address)
        async with client:
            task = asyncio.create_task(client.score(await client.teacher(), SPEC, batch(1)))
            while not server.counters()["open_requests"]:
                await asyncio.sleep(0.01)
            hole.closed = True
            async with asyncio.timeout(20):
                while server.counters()["open_requests"] or server.counters()["open_streams"]:
                    await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await hole.stop()


class _BlackHole:
    """A TCP relay that can stop passing anything on while keeping both connections open."""

    def __init__(self, target):
        self._target = target.rsplit(":", 1)
        self.closed = False
        self._tasks = set()

    async def start(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self):
        self._server.close()
        for task in self._tasks:
            task.cancel()

    async def _serve(self, reader, writer):
        to_reader, to_writer = await asyncio.open_connection(*self._target)
        for pair in ((reader, to_writer), (to_reader, writer)):
            task = asyncio.create_task(self._pipe(*pair))
            self._tasks.add(task)

    async def _pipe(self, reader, writer):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if not self.closed:
                    writer.write(data)
                    await writer.drain()


async def test_health_is_told_for_each_teacher_and_from_the_truth():
    said = health_pb2.HealthCheckResponse

    async def asked(stub, service):
        try:
            return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status
        except grpc.aio.AioRpcError as error:
            return error.code()

    async with edge() as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def becomes(**expected):
            async with asyncio.timeout(10):
                while True:
                    found = {
                        name: await asked(stub, f"{SERVICE}/{name}" if name else SERVICE) for name in ("", "a", "b")
                    }
                    if found == {"": said.SERVING, **expected}:
                        return
                    await asyncio.sleep(0.005)

        unknown = grpc.StatusCode.NOT_FOUND
        await becomes(a=unknown, b=unknown)
        server.set_healthy({"a": True, "b": False})
        await becomes(a=said.SERVING, b=said.NOT_SERVING)
        server.set_healthy({"a": False, "b": False})
        async with asyncio.timeout(10):
            while await asked(stub, SERVICE) != said.NOT_SERVING:
                await asyncio.sleep(0.005)
        assert await asked(stub, "") == said.SERVING, "the edge itself is well"
        server.set_healthy({"a": True})
        await becomes(a=said.SERVING, b=said.SERVICE_UNKNOWN)
