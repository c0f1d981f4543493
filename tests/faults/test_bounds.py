"""What one peer may make a server hold or walk: every bound met over real gRPC, below the client where it would not go."""

import asyncio
import contextlib
import threading
import tracemalloc

import grpc
import numpy as np
import pytest

from teacher_server.config.server import EdgeConfig
from teacher_server.edge.server import EdgeServer
from teacher_wire import PROTOCOL
from teacher_wire.core import tensor_codec
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import (
    DeadlineError,
    LimitError,
    OverloadedError,
    RequestError,
    ServerError,
    TeacherWireError,
)
from teacher_wire.core.info import Limits
from teacher_wire.core.tensor import Tensor
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.endpoint.servicer import TeacherServicer
from teacher_wire.generate import codec as generate_codec
from teacher_wire.generate.messages import GenerateCall, PromptBatch, SamplingSpec
from teacher_wire.score import asked, codec
from teacher_wire.score.kept_replies import ReplyEncoder
from teacher_wire.score.signals import spec_of
from teacher_wire.score.stream import ScoreStream
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from teacher_wire.transport import status_table
from teacher_wire.transport.channel import CLIENT_OPTIONS, TENANT_KEY
from teacher_wire.transport.stream_limits import StreamLimits
from teacher_wire.v2 import teacher_pb2 as pb
from tests.e2e.conftest import free_port

SPEC = spec_of("top_k", 64, k=4)
LIMITS = Limits(4096, 65_536, 1024, 4096, 64 << 20, 4096, 64, 1 << 20, 65_536)
SERVICE = "/teacher_wire.v2.Teacher/"


class Stream:
    """A Score stream in bytes."""

    def __init__(self, channel, window_bytes=64 << 20, tenant=""):
        self.call = channel.stream_stream(SERVICE + "Score")(metadata=((TENANT_KEY, tenant),) if tenant else ())
        self._window_bytes = window_bytes

    async def open(self):
        await self.up(open=pb.Open(protocol=PROTOCOL, window_bytes=self._window_bytes))
        return self

    async def up(self, **message):
        await self.call.write(pb.ScoreUp(**message).SerializeToString())

    async def ask(self, request_id, batch, spec=SPEC):
        await self.up(request=codec.encode_call(ScoreCall(request_id, "", "", spec, batch)))

    async def ends(self, count=1):
        """The next so many ends of requests, as (id, error or None)."""
        found = []
        while len(found) < count:
            data = await self.call.read()
            assert data is not grpc.aio.EOF
            down = pb.ScoreDown.FromString(data)
            if down.HasField("done"):
                found.append((down.done.request_id, None))
            elif down.HasField("failed"):
                assert len(data) < 4096
                found.append((down.failed.request_id, status_table.from_detail(down.failed.error)))
        return found


@contextlib.asynccontextmanager
async def channel_to(server):
    async with grpc.aio.insecure_channel(server.address, options=CLIENT_OPTIONS) as channel:
        yield channel


@contextlib.asynccontextmanager
async def stream_to(server):
    async with channel_to(server) as channel:
        stream = await Stream(channel).open()
        yield stream
        stream.call.cancel()


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def batch(*first):
    return TokenBatch.pack([[number, 2, 3] for number in first or (1,)])


# ----------------------------------------------------------- lists in messages


def request_with(**fields):
    call = GenerateCall("", "", SamplingSpec(samples=64, max_new_tokens=1), PromptBatch.pack([[1]] * 1024))
    request = generate_codec.encode_generate(call)
    for name, value in fields.items():
        if name == "stop_ids":
            request.sampling.stop_ids.extend(value)
        elif name == "json_schema":
            request.sampling.json_schema = value
        else:
            getattr(request, name).CopyFrom(value)
    return request


PAIRS = np.stack(np.divmod(np.arange(1_900_000, dtype=np.int32) % 65_536, 64), 1).astype(np.int32)
TOO_MANY = {
    "have of 15 MB": {"have": tensor_codec.encode(Tensor("int32", PAIRS))},
    "have of negative pairs": {"have": tensor_codec.encode(Tensor("int32", -PAIRS[:65_000] - 1))},
    "a pair twice": {"have": tensor_codec.encode(Tensor("int32", np.repeat(PAIRS[:32_000], 2, axis=0)))},
    "a million stop ids": {"stop_ids": [1] * 1_000_000},
    "a million axes": {"token_ids": pb.Tensor(dtype=pb.INT32, shape=[1] * 1_000_000)},
    "axes of have": {"have": pb.Tensor(dtype=pb.INT32, shape=[1] * 1_000_000)},
    "a schema of 4 MB": {"json_schema": b'{"enum":[' + b"1," * 2_000_000 + b"1]}"},
}


@pytest.mark.parametrize("name", TOO_MANY)
def test_a_list_is_refused_before_it_is_walked(name):
    """Refusing costs a few times the message in memory, not Python objects for each entry."""
    data = request_with(**TOO_MANY[name]).SerializeToString()
    request = pb.GenerateRequest.FromString(data)
    tracemalloc.start()
    try:
        with pytest.raises(RequestError):
            generate_codec.decode_generate(request, "", LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(data) + (4 << 20)
    finally:
        tracemalloc.stop()


def test_as_many_pairs_as_a_call_has_samples_are_taken():
    pairs = PAIRS[:65_535]
    request = request_with(have=tensor_codec.encode(Tensor("int32", pairs)))
    call = generate_codec.decode_generate(request, "", LIMITS)
    assert call.samples == 1 and list(call.wanted()) == [(1023, 63)]
    assert call.tokens == 2


# --------------------------------------------------------- long work, off the loop


async def test_long_messages_are_decoded_hashed_and_encoded_off_the_event_loop(monkeypatch):
    where = {}

    def spy(module, name):
        real = getattr(module, name)

        def spied(*arguments):
            where.setdefault(name, set()).add(threading.current_thread().name)
            return real(*arguments)

        monkeypatch.setattr(module, name, spied)

    from teacher_server.edge import label_sharing

    for module, name in ((codec, "decode_call"), (codec, "check_call"), (asked, "content_key"),
                         (ReplyEncoder, "encode"), (label_sharing, "label_keys")):  # fmt: skip
        spy(module, name)
    async with edge(FakeTeacher()) as server, TeacherClient(server.address) as client:
        info = await client.teacher()
        long = TokenBatch.pack([[1, 2] * 2000] * 5)
        codec_check, where["check_call"] = where.get("check_call"), set()
        assert codec_check is None
        await client.score(info, spec_of("full", 64), long)
    where["check_call"].discard(threading.main_thread().name)  # the client's own
    assert set(where) == {"decode_call", "check_call", "content_key", "encode", "label_keys"}
    for name, threads in where.items():
        assert threads and all(thread.startswith("offload") for thread in threads), (name, threads)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("request_id", ["x" * 200_000, "a\nb", "", "\u202e"])
async def test_an_id_that_is_none_is_not_sent_back(request_id):
    with serve(FakeTeacher()) as server:
        async with stream_to(server) as stream:
            await stream.ask(request_id, batch())
            await stream.up(part=pb.RequestPart(request_id=request_id, total_bytes=10, data=b"x"))
            for echoed, error in await stream.ends(2):
                assert echoed == "" and isinstance(error, RequestError) and error.field == "request_id"
            await stream.ask("good", batch())
            assert await stream.ends() == [("good", None)]


class Deaf:
    """A peer that sends bad requests for ever and takes nothing until `hears` is set."""

    def __init__(self, requests):
        self.hears, self.written, self.taken = asyncio.Event(), 0, 0
        self._requests = requests

    async def read(self):
        await asyncio.sleep(0)
        if self.written == self._requests:
            return None
        self.written += 1
        if self.written == 1:
            return pb.ScoreUp(open=pb.Open(protocol=PROTOCOL, window_bytes=1)).SerializeToString()
        return pb.ScoreUp(request=pb.ScoreRequest(request_id="x" * 2000)).SerializeToString()

    async def send(self, data):
        await self.hears.wait()
        self.taken += 1


async def test_who_does_not_read_its_refusals_is_not_read_from():
    limits = StreamLimits(max_unread_refusals=8)
    servicer = TeacherServicer(FakeTeacher(), limits=limits)
    peer = Deaf(1000)
    stream = ScoreStream(servicer._shared, servicer._accounts.enter(""), peer)
    running = asyncio.create_task(stream.run())
    async with asyncio.timeout(30):
        while peer.written < 9:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert peer.written == 9 and len(stream._out) <= 8
    peer.hears.set()  # and who takes again is read from again
    async with asyncio.timeout(30):
        await running
    assert peer.taken == 999


@pytest.mark.parametrize("method", ["Describe", "Generate", "Artifact", "Score", "Status"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(method):
    with serve(FakeTeacher()) as server:
        async with channel_to(server) as channel:
            data = b"\x0a\xff\xff\xff\xff\x0f"
            if method == "Score":
                call = channel.stream_stream(SERVICE + method)()
                await call.write(data)
            elif method in ("Describe", "Status"):
                call = channel.unary_unary(SERVICE + method)(data)
            else:
                call = channel.unary_stream(SERVICE + method)(data)
            assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
            detail = dict(await call.trailing_metadata())[status_table.DETAIL_KEY]
            assert pb.ErrorDetail.FromString(detail).kind == "RequestError"


async def test_a_message_too_long_for_grpc_is_no_overload():
    """The same message is too long however often it is sent."""
    with serve(FakeTeacher()) as server:
        async with channel_to(server) as channel:
            call = channel.unary_stream(SERVICE + "Generate")(bytes(6 << 20))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert isinstance(status_table.from_rpc(caught.value, "host:1"), LimitError)


# ------------------------------------------------------------------ what is held


@contextlib.asynccontextmanager
async def edge(teacher, **changes):
    server = EdgeServer(EdgeConfig(port=free_port(), drain_s=0, **changes), teacher)
    await server.start()
    try:
        yield server
    finally:
        await server.drain()


async def test_replies_nobody_takes_are_bounded_by_tenant_and_others_are_served():
    teacher = FakeTeacher(vocab_rows=256, hidden_size=4)
    limits = {"unproven_replies_held_mb": 2, "tenant_replies_held_mb": 4, "stall_s": 600}
    wide, each = spec_of("full", 256), 60
    async with edge(teacher, limits=limits, store={"memory_mb": 0}) as server, channel_to(server) as channel:
        greedy = [await Stream(channel, tenant="greedy").open() for _ in range(2)]
        for number in range(2 * each):  # 1 MB an answer: far more than the connection takes up
            tokens = TokenBatch.pack([[(number + i) % 256 for i in range(1000)]])
            await greedy[number % 2].ask(f"r{number}", tokens, wide)
        last = -1
        while teacher.calls != last:  # until it stands still
            last = teacher.calls
            await asyncio.sleep(1)
        assert teacher.calls < 2 * each
        async with TeacherClient(server.address, retry_for_s=0) as client:
            for number in range(20):
                assert (await client.score(await client.teacher(), SPEC, batch(number))).rows == 2
                assert 0 < server.counters()["held"]["reply_bytes"] <= 4 << 20
        for stream in greedy:
            stream.call.cancel()
        held = ("open_calls", "request_bytes", "reply_bytes")
        await until(lambda: not any(server.counters()["held"][name] for name in held))


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        ({"max_tenant_requests": 3}, "max_tenant_requests"),
        ({"max_tenant_request_held_bytes": 7000}, "max_tenant_request_held_bytes"),
        ({"max_request_held_bytes": 7000}, "max_request_held_bytes"),
    ],
)
async def test_open_requests_are_bounded_over_all_streams_of_a_tenant(limits, field):
    with serve(FakeTeacher(delay_s=60), limits=StreamLimits(**limits)) as server:
        async with stream_to(server) as one, stream_to(server) as two:
            for number in range(3):
                await one.ask(f"r{number}", batch())
            await until(lambda: server.servicer.open_requests == 3)
            await two.ask("r", batch())
            ((_, error),) = await two.ends()
            assert isinstance(error, OverloadedError) and error.field == field and error.retry_after_s > 0
            await one.up(cancel=pb.Cancel(request_id="r0"))
            await until(lambda: server.servicer.open_requests == 2)
            await two.ask("r", batch())
            await until(lambda: server.servicer.open_requests == 3)


async def test_open_calls_are_bounded():
    with serve(FakeTeacher(), limits=StreamLimits(max_tenant_calls=2)) as server:
        async with stream_to(server) as one, stream_to(server) as two, channel_to(server) as channel:
            for stream in (one, two):
                await stream.ask("r", batch())
                await stream.ends()
            calls = [
                Stream(channel).call,
                channel.unary_stream(SERVICE + "Generate")(b""),
                channel.unary_stream(SERVICE + "Artifact")(b""),
            ]
            for call in calls:
                assert await call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            one.call.cancel()
            await until(lambda: server.servicer.open_streams == 1)
            three = await Stream(channel).open()
            await three.ask("r", batch())
            assert await three.ends() == [("r", None)]
            three.call.cancel()


async def test_a_peer_that_takes_nothing_is_dropped():
    teacher = FakeTeacher(vocab_rows=1024, hidden_size=4)
    with serve(teacher, limits=StreamLimits(stall_s=0.5)) as server:
        async with stream_to(server) as stream:
            tokens = TokenBatch.pack([[i % 1024 for i in range(4000)]])  # 16 MB: more than the connection takes up
            await stream.ask("r", tokens, spec_of("full", 1024))
            await until(lambda: server.servicer.held["reply_bytes"] > 0)
            await until(lambda: server.servicer.held["open_calls"] == 0)
            assert server.servicer.held["reply_bytes"] == 0
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await stream.call.read() is not grpc.aio.EOF:
                    pass
            assert await stream.call.code() == grpc.StatusCode.UNAVAILABLE


async def test_names_of_replies_never_acknowledged_are_forgotten():
    with serve(FakeTeacher(), limits=StreamLimits(max_open_requests=4)) as server:
        async with stream_to(server) as stream:
            for number in range(40):
                await stream.ask(f"r{number}", batch())
                await stream.ends()
            (held,) = server.servicer._streams
            assert len(held._keys) == 8


async def test_a_reply_that_cannot_be_encoded_gives_its_window_back(monkeypatch):
    def broken(*arguments):
        raise ValueError("no such tensor")

    teacher = FakeTeacher()
    window = 2 * SPEC.row_bytes(teacher.hidden_size, 4)
    with serve(teacher) as server:
        async with channel_to(server) as channel:
            stream = await Stream(channel, window_bytes=window).open()  # of one answer
            monkeypatch.setattr(codec, "encode_chunks", broken)
            await stream.ask("r0", batch())
            ((_, error),) = await stream.ends()
            assert isinstance(error, ServerError)
            monkeypatch.undo()
            await stream.ask("r1", batch())
            assert await stream.ends() == [("r1", None)]
            stream.call.cancel()


# ------------------------------------------------------------ requests in parts


async def test_a_legal_request_above_any_message_is_answered_and_so_are_its_neighbours():
    teacher = FakeTeacher(vocab_rows=128, hidden_size=4)
    with serve(teacher) as server:
        async with TeacherClient(server.address, retry_for_s=0) as client:
            info = await client.teacher()
            long = TokenBatch.pack([[(i * 7) % 128 for i in range(4096)]] * 16)
            extra_NM = np.tile(np.arange(80, dtype=np.int32), (long.rows, 1))
            long = TokenBatch(long.token_ids_T, long.cu_lengths_B1, long.wanted_T, extra_NM)
            assert long.tokens == 65_536 and extra_NM.nbytes > 16 << 20
            asked = [client.score(info, spec_of("top_k", 128, k=1, extra=80), long)]
            asked += [client.score(info, spec_of("top_k", 128, k=4), batch(number)) for number in range(8)]
            answers = await asyncio.gather(*asked)
            assert [answer.rows for answer in answers] == [long.rows] + [2] * 8
            assert client.stats.reconnects == client.stats.retries == 0


def in_parts(request_id, size=50, **changes):
    data = codec.encode_call(ScoreCall(request_id, "", "", SPEC, batch())).SerializeToString()
    for offset in range(0, len(data), size):
        part = pb.RequestPart(
            request_id=request_id, total_bytes=len(data), offset=offset, data=data[offset : offset + size]
        )
        for name, value in changes.items():
            if offset or name == "total_bytes":
                setattr(part, name, value)
        yield part


BAD_PARTS = {
    "too long": ({"total_bytes": (64 << 20) + 1}, "part.total_bytes"),
    "nothing": ({"total_bytes": 0}, "part.total_bytes"),
    "shorter than its parts": ({"total_bytes": 60}, "part"),
    "a hole": ({"offset": 51}, "part"),
    "empty": ({"data": b""}, "part"),
}


@pytest.mark.parametrize("name", BAD_PARTS)
async def test_parts_that_do_not_fit_are_refused_once(name):
    changes, field = BAD_PARTS[name]
    with serve(FakeTeacher()) as server:
        async with stream_to(server) as stream:
            for part in in_parts("bad", **changes):
                await stream.up(part=part)
            for part in in_parts("good"):
                await stream.up(part=part)
            (request_id, error), good = await stream.ends(2)
            assert request_id == "bad" and isinstance(error, RequestError) and error.field == field
            assert good == ("good", None)
            assert server.servicer.held["request_bytes"] == 0


async def test_parts_are_counted_from_the_first_and_given_up_when_taken_back_or_late():
    with serve(FakeTeacher(), limits=StreamLimits(stall_s=1.0)) as server:
        async with stream_to(server) as stream:
            half = pb.RequestPart(request_id="r", total_bytes=32 << 20, data=b"x")
            await stream.up(part=half)
            await until(lambda: server.servicer.held["request_bytes"] == 32 << 20)
            await stream.up(cancel=pb.Cancel(request_id="r"))
            await until(lambda: server.servicer.held["request_bytes"] == 0)
            await stream.up(part=half)
            ((_, error),) = await stream.ends()
            assert isinstance(error, DeadlineError)
            assert server.servicer.held["request_bytes"] == 0
            await stream.up(part=pb.RequestPart(request_id="r", total_bytes=32 << 20, offset=1, data=b"x"))  # ignored
            await stream.ask("good", batch())
            assert await stream.ends() == [("good", None)]


async def test_a_stream_that_ends_amid_a_request_says_so():
    with serve(FakeTeacher()) as server:
        async with stream_to(server) as stream:
            await stream.up(part=pb.RequestPart(request_id="r", total_bytes=100, data=b"x"))
            await stream.call.done_writing()
            ((request_id, error),) = await stream.ends()
            assert request_id == "r" and isinstance(error, TeacherWireError) and error.field == "part"
