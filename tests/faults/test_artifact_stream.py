"""Artifacts over the wire, by the example of the output head: taken up where a call broke, within a deadline, a quota and few at a time."""

import asyncio
import contextlib
import threading
from dataclasses import replace

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from teacher_server.cli.main import app
from teacher_server.config.server import EdgeConfig, TeacherConfig, TenantConfig
from teacher_server.edge.server import EdgeServer
from teacher_server.replica.engine import TeacherEngine
from teacher_wire.artifacts import codec
from teacher_wire.artifacts.kinds.output_head import TeacherHead
from teacher_wire.artifacts.messages import ArtifactCall
from teacher_wire.core.errors import CapabilityError, DeadlineError, LabelError, OverloadedError, UnavailableError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from teacher_wire.transport.channel import CLIENT_OPTIONS, Credentials
from teacher_wire.transport.stream_limits import StreamLimits
from teacher_wire.v2 import teacher_pb2 as pb
from tests.e2e.conftest import free_port
from tests.tiny import fetched_head

ROWS = 150_000  # of 32 bytes: five chunks


class Leaky(FakeTeacher):
    """Gives so many slices of its head a call, and then goes away."""

    def __post_init__(self):
        super().__post_init__()
        self.slices, self.asked, self.pause_s, self.change = 10**9, [], 0.0, lambda data: data

    async def artifact_bytes(self, call, offset, size):
        await asyncio.sleep(self.pause_s)
        self.asked.append((call.fingerprint, offset))
        if len(self.asked) % (self.slices + 1) == self.slices:
            raise UnavailableError("the replica went away")
        return self.change(memoryview(self.weight_VD).cast("B")[offset : offset + size].tobytes())


def leaky():
    return Leaky(vocab_rows=ROWS, hidden_size=8)


def request(**changes):
    named = {"kind": "output_head", "sha256": HEAD.sha256}
    return pb.ArtifactRequest(**{**named, **changes})


HEAD = leaky().artifacts()[0].header


async def codes_of(server, *requests):
    async with grpc.aio.insecure_channel(server.address, options=CLIENT_OPTIONS) as channel:
        start = channel.unary_stream("/teacher_wire.v2.Teacher/Artifact")
        calls = [start(request.SerializeToString()) for request in requests]
        for call in calls:
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in call:
                    pass
        return [await call.code() for call in calls]


async def test_a_head_that_breaks_off_is_taken_up_where_it_was():
    teacher = leaky()
    teacher.slices = 2
    with serve(teacher) as server:
        async with TeacherClient(server.address, backoff_s=(0.01, 0.02), on_trouble=lambda error: None) as client:
            info = await client.teacher()
            seen = []
            head = await fetched_head(client, info, lambda received, whole: seen.append(received))
            np.testing.assert_array_equal(head.weight_VD.array, teacher.weight_VD)
            assert client.stats.retries >= 2
    offsets = [offset for _, offset in teacher.asked]
    assert len(set(offsets)) == 5 and len(offsets) <= 5 + client.stats.retries  # none sent twice
    assert seen == sorted(set(seen))
    assert {fingerprint for fingerprint, _ in teacher.asked} == {info.fingerprint}


async def test_without_a_fingerprint_all_slices_are_of_the_same_weights():
    teacher = leaky()
    with serve(teacher) as server:
        assert await codes_of(server, request()) == [grpc.StatusCode.OK]
    assert {fingerprint for fingerprint, _ in teacher.asked} == {teacher.teacher_info().fingerprint}


async def test_a_head_that_comes_too_late_is_refused():
    teacher = leaky()
    teacher.pause_s = 0.5
    with serve(teacher) as server:
        async with TeacherClient(server.address, retry_for_s=0) as client:
            with pytest.raises(DeadlineError):
                await fetched_head(client, await client.teacher(), timeout_s=0.7)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: bytes(len(data))])
async def test_a_head_that_is_not_the_described_one_is_refused(change):
    teacher = leaky()
    teacher.change = change
    with serve(teacher) as server:
        async with TeacherClient(server.address, retry_for_s=0) as client:
            with pytest.raises(LabelError):
                await fetched_head(client, await client.teacher())


async def test_an_offset_beyond_the_artifact_and_names_that_are_none_are_refused():
    with serve(leaky()) as server:
        codes = await codes_of(
            server, request(offset=ROWS * 32), request(offset=ROWS * 32 + 1),
            request(offset=2**63), request(teacher="x" * 1000), request(kind=""), request(sha256=""),
            request(kind="x" * 1000), request(sha256="0" * 64), request(kind="pca_basis"),
        )  # fmt: skip
    assert [code.name for code in codes] == ["OK", *["INVALID_ARGUMENT"] * 6, *["UNIMPLEMENTED"] * 2]


async def test_few_heads_at_a_time():
    teacher = leaky()
    teacher.pause_s = 0.2
    with serve(teacher, limits=StreamLimits(max_tenant_artifacts=2)) as server:
        codes = await codes_of(server, *[request()] * 4)
        assert sorted(code.name for code in codes) == ["OK"] * 2 + ["RESOURCE_EXHAUSTED"] * 2
        assert await codes_of(server, request()) == [grpc.StatusCode.OK]


async def test_a_head_is_charged_to_the_tenants_bytes():
    server = EdgeServer(EdgeConfig(port=free_port(), drain_s=0), leaky())
    await server.start()
    server.set_tenants({"t": TenantConfig(bytes_per_s=1 << 20)})
    try:
        told = []
        client = TeacherClient(server.address, credentials=Credentials(tenant="t"), on_trouble=told.append)
        async with client:
            head = await fetched_head(client, await client.teacher())  # waits as told, and goes on where it was
            assert head.weight_VD.shape == (ROWS, 8)
        assert told and {type(error) for error in told} == {OverloadedError}
        assert told[0].field == "tenants.t.bytes_per_s"
        assert server.counters()["tenants"]["t"]["sent_bytes"] == ROWS * 32
    finally:
        await server.drain()


async def test_an_engine_loads_its_head_once_and_not_between_forward_passes(model_factory):
    backend = {"kind": "transformers", "model": str(model_factory("qwen2")), "dtype": "float32", "device": "cpu"}
    engine = TeacherEngine(TeacherConfig.model_validate({"name": "t", "backend": backend}))
    threads, real = [], engine._backend.artifact

    def artifact(wanted):
        threads.append(threading.current_thread().name)
        return real(wanted)

    engine._backend.artifact = artifact
    wanted = engine.info.artifact("output_head")
    call = ArtifactCall("t", "", wanted.kind, wanted.sha256)
    headers = await asyncio.gather(*(engine.artifact_header(call) for _ in range(4)))
    assert len(threads) == 1 and not threads[0].startswith("forward")
    assert {header.sha256 for header in headers} == {wanted.sha256}
    for other in (replace(call, fingerprint="f" * 64), replace(call, sha256="0" * 64), replace(call, kind="pca_basis")):
        with pytest.raises(CapabilityError) as refused:
            await engine.artifact_bytes(other, 0, 8)
        assert refused.value.field == ("fingerprint" if other.fingerprint else "artifact")
    await engine.stop()


async def test_an_artifact_is_put_together_in_the_memory_it_stays_in():
    teacher = leaky()
    artifact, info = teacher.artifacts()[0], teacher.teacher_info()
    assembly = codec.ArtifactAssembly(info, info.artifacts[0])
    assembly.take(codec.encode_header(artifact.header))
    data = teacher.weight_VD.tobytes()
    for offset in range(0, len(data), 1 << 20):
        assembly.take(pb.ArtifactChunk(offset=offset, data=data[offset : offset + (1 << 20)]))
    head = TeacherHead.of(assembly.whole())
    assert np.shares_memory(head.weight_VD.array, assembly._room[0])


def test_the_server_command_lists_what_a_teacher_gives_away(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with serve(leaky()) as server:
        shown = CliRunner().invoke(app, ["describe", "--address", server.address])
    assert shown.exit_code == 0, shown.output
    assert f"output_head {HEAD.sha256} (4,800,000 bytes)" in shown.output
