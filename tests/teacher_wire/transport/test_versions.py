"""Student and server of different protocol versions: both are told so by name."""

import contextlib

import grpc
import pytest

from teacher_server.config.server import EdgeConfig
from teacher_server.edge.server import EdgeServer
from teacher_wire import PROTOCOL
from teacher_wire.core.errors import CapabilityError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from teacher_wire.transport import status_table
from teacher_wire.v2 import teacher_pb2 as pb
from tests.e2e.conftest import free_port

REQUEST = b"\x0a\x04fake"  # a message with a text in field 1


@contextlib.asynccontextmanager
async def raw(address):
    async with grpc.aio.insecure_channel(address) as channel:
        yield channel


@contextlib.asynccontextmanager
async def server_of(**methods):
    """A server that has these methods alone, each by its full name: the bytes that it answers."""
    server = grpc.aio.server()
    for method, answer in methods.items():

        async def reply(_data, _context, answer=answer):
            return answer

        service, name = method.rsplit("__", 1)
        handlers = {name: grpc.unary_unary_rpc_method_handler(reply)}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service.replace("_v", ".v") + ".Teacher", handlers),)
        )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def test_an_older_student_learns_our_version_from_describe():
    with serve(FakeTeacher()) as server:
        async with raw(server.address) as channel:
            for version in (1, 3):
                assert await channel.unary_unary(f"/teacher_wire.v{version}.Teacher/Describe")(b"") == b"\x08\x02"


@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize("method", ["Score", "Generate", "Head", "Status", "Artifact", "Whatever"])
async def test_every_other_call_of_another_version_is_refused_by_name(method, version):
    with serve(FakeTeacher()) as server:
        async with raw(server.address) as channel:
            path = f"/teacher_wire.v{version}.Teacher/{method}"
            if method == "Status":
                call = channel.unary_unary(path)(REQUEST)
            elif method == "Score":
                call = channel.stream_stream(path)(iter([REQUEST]))
            else:
                call = channel.unary_stream(path)(REQUEST)
            assert await call.code() == grpc.StatusCode.FAILED_PRECONDITION
            detail = pb.ErrorDetail.FromString(dict(await call.trailing_metadata())[status_table.DETAIL_KEY])
    assert detail.kind == "CapabilityError" and detail.field == "protocol"
    assert f"version {version} " in detail.message and f"version {PROTOCOL}" in detail.message
    assert detail.message.endswith("upgrade the student" if version < PROTOCOL else "upgrade the server")


async def test_what_is_no_version_of_ours_is_unknown():
    with serve(FakeTeacher()) as server:
        async with raw(server.address) as channel:
            for path in (
                "/teacher_wire.v1.Other/Score",
                "/teacher_wire.v2.Teacher/Head",
                "/teacher_wire.vx.Teacher/Score",
            ):
                assert await channel.unary_unary(path)(b"").code() == grpc.StatusCode.UNIMPLEMENTED


async def test_the_products_edge_refuses_too():
    server = EdgeServer(EdgeConfig(port=free_port(), drain_s=0), FakeTeacher())
    await server.start()
    try:
        async with raw(server.address) as channel:
            assert await channel.unary_unary("/teacher_wire.v1.Teacher/Describe")(b"") == b"\x08\x02"
            assert (
                await channel.unary_stream("/teacher_wire.v1.Teacher/Head")(b"").code()
                == grpc.StatusCode.FAILED_PRECONDITION
            )
    finally:
        await server.drain()


async def test_our_student_names_the_version_of_an_older_server():
    async with server_of(teacher_wire_v1__Describe=b"\x08\x01") as address, TeacherClient(address) as client:
        with pytest.raises(CapabilityError) as refused:
            await client.describe()
    said = str(refused.value)
    assert "the student speaks version 2" in said and "the server version 1" in said and address in said
    assert said.count("upgrade the server") == 1


async def test_our_student_names_a_server_that_is_newer_or_none_at_all():
    async with server_of(teacher_wire_v2__Describe=b"\x08\x03") as address, TeacherClient(address) as client:
        with pytest.raises(CapabilityError, match=r"value=3, limit=2"):
            await client.describe()
    async with server_of(teacher_wire_v1__Status=b"") as address, TeacherClient(address) as client:
        with pytest.raises(CapabilityError, match=r"UNIMPLEMENTED.*another program answers there, no teacher-server"):
            await client.describe()
