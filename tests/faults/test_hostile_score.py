"""Two thousand hostile Score requests over real gRPC: refused by name, or answered; the server lives and holds nothing.

Every field of a request, and bytes of messages, are drawn by hypothesis; they are sent below the
client, which would refuse them before sending. The backends are the fake and transformers here,
and vLLM in tests/teacher_server/test_vllm_backend.py, whose engine has started already.

What is wrong in itself ends in INVALID_ARGUMENT or RESOURCE_EXHAUSTED. A request that is well formed but asks for what this server
has not gets the code that gRPC's own list gives for it, and by which a student decides what to do: NOT_FOUND for a teacher's name that
nobody here has (a name that is too long or not printable is INVALID_ARGUMENT), FAILED_PRECONDITION for the fingerprint of other weights
(the student asks again for what the teacher is now), UNIMPLEMENTED for a signal that this teacher does not give. These three answer one
field each and say nothing of the others, so every request that got one is sent again without that field, until none gets any: then
INVALID_ARGUMENT, RESOURCE_EXHAUSTED and OK are all there is.
"""

import asyncio
import contextlib
import functools
import random
from collections import Counter

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from teacher_server.config.server import TeacherConfig
from teacher_server.replica.engine import TeacherEngine
from teacher_wire import PROTOCOL
from teacher_wire.core import tensor_codec
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.tensor import Tensor
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score import codec
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from teacher_wire.transport import status_table
from teacher_wire.transport.channel import CLIENT_OPTIONS
from teacher_wire.v2 import teacher_pb2 as pb
from tests.e2e.classroom import EngineService

REQUESTS, AT_ONCE, VOCAB = 2000, 100, 64
ALLOWED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}
# What is well formed and not here: the field that the refusal names, and where it stands in the request.
NAMED = {
    grpc.StatusCode.NOT_FOUND: ("teacher", "teacher"),
    grpc.StatusCode.FAILED_PRECONDITION: ("fingerprint", "fingerprint"),
    grpc.StatusCode.UNIMPLEMENTED: ("signal", "spec"),
}
WINDOW = 64 << 20
UINT32, UINT64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
FEW = st.sampled_from([0, 1, 2, 3, 4, 63, 64, 65, 2**16, 2**31, 2**32 - 1])


def ordinary():
    batch = TokenBatch.pack([[1, 2, 3, 4], [5, 6, 7]])
    request = codec.encode_call(ScoreCall("r", "", "", spec_of("top_k", VOCAB, k=4), batch))
    assert request.spec.signals[0].numbers["k"] == 4
    return request


@st.composite
def tensor(draw):
    """Shapes, dtypes and bytes that fit each other or not."""
    dtype = draw(st.sampled_from([*range(10), 77]))
    shape = draw(st.one_of(
        st.lists(st.integers(0, 12), max_size=3),
        st.lists(st.one_of(UINT64, st.sampled_from([2**40, 2**63])), max_size=6),
        st.just([1] * 10_000),
    ))  # fmt: skip
    data = draw(st.one_of(st.binary(max_size=64), st.sampled_from([b"", bytes(7), bytes(28), b"\xff" * 28])))
    return pb.Tensor(dtype=dtype, shape=shape, data=data)


INTS = st.one_of(st.integers(-2, 8), st.sampled_from([VOCAB - 1, VOCAB, 255, 2**31 - 1, -(2**31)]))
INT32 = st.lists(INTS, max_size=12).map(lambda values: tensor_codec.encode(Tensor("int32", np.array(values, np.int32))))
FLAGS = st.lists(st.integers(0, 2), max_size=12).map(
    lambda values: tensor_codec.encode(Tensor("uint8", np.array(values, np.uint8)))
)
NAMES = st.one_of(
    st.sampled_from(["", "fake", "t", "x" * 65, "x" * 200_000, "\0", "a\nb", "\u202e", "ä" * 64, "../../etc"]),
    st.text(max_size=80),
)
NUMBERS = st.one_of(FEW, st.floats(), st.sampled_from([-1, 2**53, 1e308]))
SIGNALS = st.builds(
    pb.Signal,
    kind=st.one_of(st.sampled_from(["top_k", "hidden", "full", "", "x" * 200_000]), NAMES),
    layers=st.one_of(st.just([]), st.lists(UINT32, max_size=3), st.just([1] * 100_000)),
    reduction=st.one_of(st.sampled_from(["", "none", "int8", "zip"]), NAMES),
    numbers=st.dictionaries(st.one_of(st.sampled_from(["k", "extra"]), NAMES), NUMBERS, max_size=3),
)
SPECS = st.builds(
    pb.SignalSpec,
    signals=st.one_of(st.lists(SIGNALS, max_size=4), st.just([pb.Signal(kind="hidden")] * 10_000)),
    vocab_rows=st.one_of(FEW, UINT32),
    check=st.sampled_from([0, 1, 2, 50]),
)
FIELDS = {
    "teacher": NAMES, "fingerprint": NAMES, "spec": SPECS, "timeout_ms": st.one_of(st.just(0), UINT64.filter(lambda ms: ms > 60_000)),
    "token_ids": st.one_of(tensor(), INT32), "cu_lengths": st.one_of(tensor(), INT32),
    "wanted": st.one_of(tensor(), FLAGS), "extra_ids": st.one_of(tensor(), INT32),
    "resume": st.builds(pb.Resume, reply_id=UINT64, next_chunk=UINT32),
}  # fmt: skip


@st.composite
def hostile(draw):
    """A request with one to three fields drawn, or with bytes of it changed."""
    request = ordinary()
    for name in draw(st.lists(st.sampled_from(list(FIELDS)), min_size=1, max_size=3, unique=True)):
        value = draw(FIELDS[name])
        if isinstance(value, str | int):
            setattr(request, name, value)
        else:
            getattr(request, name).CopyFrom(value)
    data = bytearray(request.SerializeToString())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2, 8]))):
        place = draw(st.integers(0, len(data) - 1))
        data[place] = draw(st.integers(0, 255))
    return bytes(data)


@functools.cache
def drawn(count):
    """So many hostile requests, the same ones every time."""
    found = []

    @settings(
        max_examples=count, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(hostile())
    def draw(data):
        found.append(data)

    draw()
    return found


def as_parts(data, request_id):
    """A request in parts of a few bytes."""
    size = max(1, len(data) // 3)
    for offset in range(0, len(data), size):
        yield pb.RequestPart(
            request_id=request_id, total_bytes=len(data), offset=offset, data=data[offset : offset + size]
        )


def without(data, code):
    """The request without the field for which it was refused by this code."""
    request = pb.ScoreRequest.FromString(data)
    field = NAMED[code][1]
    assert bool(getattr(request, field, "")), field
    if field == "spec":  # signals that every teacher has
        request.spec.CopyFrom(ordinary().spec)
    else:
        request.ClearField(field)
    return request.SerializeToString()


async def attack(address, requests, codes):
    """Answers by code. What is no message at all ends its stream; what is one is answered on it.

    Returns:
        What is to be sent again, see the head of this file.
    """
    rng, again = random.Random(0), []
    async with grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS) as channel:
        start = channel.stream_stream("/teacher_wire.v2.Teacher/Score")
        for first in range(0, len(requests), AT_ONCE):
            call, sent = start(), 0
            await call.write(pb.ScoreUp(open=pb.Open(protocol=PROTOCOL, window_bytes=WINDOW)).SerializeToString())
            for number, data in enumerate(requests[first : first + AT_ONCE]):
                request_id = f"h{first + number}"
                try:
                    request = pb.ScoreRequest.FromString(data)
                    request.request_id = request_id
                except DecodeError:
                    codes[await alone(start, data)] += 1
                    continue
                if rng.random() < 0.5 or len(data) > 1000:
                    await call.write(pb.ScoreUp(request=request).SerializeToString())
                else:
                    for part in as_parts(request.SerializeToString(), request_id):
                        await call.write(pb.ScoreUp(part=part).SerializeToString())
                sent += 1
            await call.done_writing()
            answered = 0
            while (down := await call.read()) is not grpc.aio.EOF:
                answer = pb.ScoreDown.FromString(down)
                if answer.HasField("done"):
                    codes["OK"] += 1
                    answered += 1
                elif answer.HasField("failed"):
                    error = status_table.from_detail(answer.failed.error)
                    code = status_table.code_of(error)
                    assert code in ALLOWED or error.field == NAMED.get(code, ("",))[0], (
                        f"{type(error).__name__}: {error}"
                    )
                    if code not in ALLOWED:
                        again.append(without(requests[int(answer.failed.request_id[1:])], code))
                    codes[code] += 1
                    answered += 1
                    assert len(down) < 4096
            assert answered == sent and await call.code() == grpc.StatusCode.OK
    return again


async def alone(start, data):
    """The code by which a stream ends that is sent these bytes in a request's place."""
    call = start()
    await call.write(pb.ScoreUp(open=pb.Open(protocol=PROTOCOL, window_bytes=WINDOW)).SerializeToString())
    await call.write(b"\x12" + varint(len(data)) + data)
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await call.read() is not grpc.aio.EOF:
            pass
    code = await call.code()
    assert code == grpc.StatusCode.INVALID_ARGUMENT, (code, await call.details())
    return code


def varint(number):
    """As protobuf writes lengths."""
    found = b""
    while number > 127:
        found += bytes([number & 127 | 128])
        number >>= 7
    return found + bytes([number])


async def withstand(service):
    """Sends all, and again what is to be sent again, and asserts that the server is as before; the answers of each round by code."""
    requests, rounds = list(drawn(REQUESTS)), []
    assert len(requests) > REQUESTS * 0.9
    while len(requests) < REQUESTS:
        requests.append(requests[len(requests) % 97])
    with serve(service) as server:
        while requests:
            rounds.append(Counter())
            again = await attack(server.address, requests, rounds[-1])
            assert sum(rounds[-1].values()) == len(requests)
            requests = again
        assert len(rounds) <= 1 + len(NAMED) and not set(rounds[-1]) - ALLOWED - {"OK"}
        async with TeacherClient(server.address) as client:
            info = await client.teacher()
            signals = await client.score(info, spec_of("top_k", VOCAB, k=4), TokenBatch.pack([[1, 2, 3]]))
            assert signals.rows == 2
        async with asyncio.timeout(10):
            while server.servicer.held["open_calls"]:
                await asyncio.sleep(0.01)
        held = server.servicer.held
        assert server.servicer.open_requests == held["request_bytes"] == held["reply_bytes"] == 0
        if isinstance(service, EngineService):
            service.stop()
    return rounds


def told(rounds):
    """The answers, a line a round."""
    for number, codes in enumerate(rounds):
        named = {getattr(code, "name", code): count for code, count in codes.most_common()}
        yield f"{sum(codes.values())} hostile requests{' again, without what is not here' * (number > 0)}: {named}"


@pytest.fixture(params=["fake", "transformers"])
def service(request, model_factory):
    if request.param == "fake":
        return FakeTeacher(vocab_rows=VOCAB)
    backend = {"kind": "transformers", "model": str(model_factory("qwen2")), "dtype": "float32", "device": "cpu"}
    return EngineService(TeacherEngine(TeacherConfig.model_validate({"name": "t", "backend": backend})))


async def test_two_thousand_hostile_requests_leave_the_server_alive(service, capsys):
    rounds = await withstand(service)
    with capsys.disabled():
        print("", *told(rounds), sep="\n")
