"""What was refused is freed at once, by reference counts alone: gRPC keeps each call that it aborts in a cycle until the next collection."""

import contextlib
import gc

import grpc
import pytest

from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from teacher_wire.v2 import teacher_pb2 as pb

SIZE = 1_234_567


def messages_alive():
    """How many byte strings of that length some object that the collector knows refers to."""
    found = set()
    for thing in gc.get_objects():
        found |= {
            id(held) for held in gc.get_referents(thing) if type(held) in (bytes, bytearray) and len(held) == SIZE
        }
    return len(found)


@pytest.fixture
def no_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("method", ["Score", "Generate", "Artifact"])
async def test_a_refused_message_is_not_kept(method, no_collection):
    with serve(FakeTeacher()) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            for _ in range(8):
                call = channel.stream_stream(f"/teacher_wire.v2.Teacher/{method}")()
                with contextlib.suppress(grpc.RpcError):
                    await call.write(b"\xff" * SIZE)
                    await call.read()
                assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
                del call
        assert messages_alive() <= 1  # the last one may still be on its way out


async def test_a_message_of_the_right_kind_that_is_refused_is_not_kept(no_collection):
    with serve(FakeTeacher()) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            empty = pb.GenerateRequest(teacher="t").SerializeToString()
            field = b"\xca\x3e"  # a field that nobody knows, of all the bytes that are left
            rest = SIZE - len(empty) - len(field) - 3
            length = bytes([rest & 127 | 128, rest >> 7 & 127 | 128, rest >> 14])
            for _ in range(8):
                call = channel.unary_stream("/teacher_wire.v2.Teacher/Generate")(empty + field + length + bytes(rest))
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await call.read()
                assert failed.value.code() != grpc.StatusCode.UNKNOWN
                del call, failed
        assert messages_alive() <= 1
