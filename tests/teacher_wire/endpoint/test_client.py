"""Client and servicer over a real socket: right answers, refusals by name, windows, broken streams."""

import asyncio
import contextlib
from dataclasses import replace

import grpc
import numpy as np
import pytest

from teacher_wire import PROTOCOL
from teacher_wire.artifacts.messages import Artifact
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import (
    CapabilityError,
    DeadlineError,
    LabelError,
    LimitError,
    MismatchError,
    NotFoundError,
    OverloadedError,
    RequestError,
    ServerError,
    UnavailableError,
)
from teacher_wire.core.tensor import float32
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.endpoint.servicer import StreamLimits
from teacher_wire.score import codec
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import LoopbackServer, serve
from teacher_wire.v2 import teacher_pb2 as pb
from teacher_wire.v2 import teacher_pb2_grpc as pb_grpc
from tests.tiny import fetched_head

QUICK = (0.02, 0.05)
BATCH = TokenBatch.pack([[1, 2, 3], [4, 5, 6, 7, 8]])
SPECS = [
    spec_of("hidden", 64),
    spec_of("full", 60),
    spec_of("top_k", 64, k=5),
    spec_of("top_k", 64, k=64),
    spec_of("hidden", 64, reduction="int8"),
]


def big_batch(sequences=8, length=400, seed=0):
    rng = np.random.default_rng(seed)
    return TokenBatch.pack([rng.integers(0, 60, length).tolist() for _ in range(sequences)])


@contextlib.asynccontextmanager
async def connected(service, *, limits=None, **options):
    with serve(service, limits=limits) as server:
        async with TeacherClient(server.address, backoff_s=QUICK, **options) as client:
            client.server = server
            yield client


async def nothing_left(server, within_s=5.0):
    """After everything, the server holds nothing."""
    async with asyncio.timeout(within_s):
        while server.servicer.open_requests or server.servicer._kept.kept_bytes:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: repr(s.signals))
async def test_labels_arrive_as_the_teacher_made_them(spec):
    fake = FakeTeacher()
    async with connected(fake) as client:
        info = await client.teacher()
        signals = await client.score(info, spec, BATCH)
        for name, tensor in fake.signals(spec, BATCH).tensors.items():
            np.testing.assert_array_equal(signals.tensors[name].array, tensor.array)
        assert signals.fingerprint == info.fingerprint
        await nothing_left(client.server)


async def test_ids_that_the_student_names_are_kept():
    fake = FakeTeacher()
    extra = np.array([[60 - i, 40, i] for i in range(BATCH.rows)], np.int32) % 64
    batch = replace(BATCH, extra_ids_NM=extra)
    async with connected(fake) as client:
        info = await client.teacher()
        spec = spec_of("top_k", 64, k=4, extra=3)
        signals = await client.score(info, spec, batch)
        assert signals["topk_ids_NK"].shape == (BATCH.rows, 7)
        for row in range(BATCH.rows):
            assert set(extra[row]) <= set(signals["topk_ids_NK"].array[row].tolist())
        for wrong, field in [
            (spec_of("top_k", 64, k=4, extra=2), "extra_ids"),
            (replace(spec, vocab_rows=20), "extra_ids"),
            (spec_of("top_k", 64, k=62), "extra_ids"),
        ]:
            with pytest.raises(RequestError) as caught:
                await client.score(info, wrong, batch)
            assert caught.value.field == field


async def test_answers_of_many_requests_come_in_chunks_and_find_their_requests():
    fake = FakeTeacher()
    async with connected(fake, window_bytes=4 << 20) as client:
        info = await client.teacher()
        batches = [big_batch(seed=i) for i in range(8)]
        answers = await asyncio.gather(*(client.score(info, spec_of("full", 64), batch) for batch in batches))
        for batch, answer in zip(batches, answers, strict=True):
            np.testing.assert_array_equal(
                answer["logits_NV"].array, fake.signals(spec_of("full", 64), batch)["logits_NV"].array
            )


async def test_the_head_arrives_and_its_digest_is_checked():
    fake = FakeTeacher()
    async with connected(fake) as client:
        info = await client.teacher()
        head = await fetched_head(client, info)
        np.testing.assert_array_equal(head.weight_VD.array, fake.weight_VD)
        described = fake.artifacts()
        fake.weight_VD = fake.weight_VD + 1
        with pytest.raises(CapabilityError):  # the server has no such head any more
            await fetched_head(client, info)
        changed = Artifact(described[0].header, {"weight_VD": float32(fake.weight_VD)})
        fake.artifact = lambda call: changed  # it sends other bytes under the old description
        with pytest.raises(LabelError):
            await fetched_head(client, info)


@pytest.mark.parametrize("mistake", ["truncated", "foreign"])
async def test_an_answer_that_breaks_the_contract_never_gets_through(mistake):
    async with connected(FakeTeacher(mistake=mistake)) as client:
        with pytest.raises(LabelError):
            await client.score(await client.teacher(), SPECS[0], BATCH)


async def test_limits_are_checked_before_anything_is_sent():
    fake = FakeTeacher(max_reply_bytes=1000)
    async with connected(fake) as client:
        info = await client.teacher()
        for batch, spec, error, field in [
            (TokenBatch.pack([[1, 99]]), SPECS[0], RequestError, "token_ids[1]"),
            (TokenBatch.pack([[1, 62]]), spec_of("full", 60), RequestError, "label of row 0"),
            (TokenBatch.pack([[1] * 5000]), SPECS[0], LimitError, "sequence 0 tokens"),
            (TokenBatch.pack([[1, 2]] * 300), SPECS[2], LimitError, "request sequences"),
            (TokenBatch.pack([[1] * 100]), SPECS[1], LimitError, "reply bytes"),
            (BATCH, spec_of("full", 65), RequestError, "vocab_rows"),
        ]:
            with pytest.raises(error) as caught:
                await client.score(info, spec, batch)
            assert caught.value.field == field
    assert fake.calls == 0


async def test_the_server_checks_too_and_the_stream_lives_on():
    """A client of another make may not check; its next request must still be answered."""
    fake = FakeTeacher()
    with serve(fake) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = pb_grpc.TeacherStub(channel).Score()
            await call.write(pb.ScoreUp(open=pb.Open(protocol=PROTOCOL, window_bytes=1 << 20)))

            async def ask(request_id, **changes):
                request = codec.encode_call(ScoreCall(request_id, "fake", "", SPECS[0], BATCH))
                request.MergeFrom(pb.ScoreRequest(**changes))
                await call.write(pb.ScoreUp(request=request))
                return await call.read()

            down = await ask("a", fingerprint="f" * 64)
            assert down.failed.error.kind == "MismatchError"
            assert (await ask("b", spec=pb.SignalSpec(vocab_rows=1000))).failed.error.field == "vocab_rows"
            assert (await ask("c" * 100)).failed.error.field == "request_id"
            assert (await ask("d", teacher="nobody")).failed.error.kind == "NotFoundError"
            assert (await ask("e")).chunk.rows == BATCH.rows
            call.cancel()
    assert fake.calls == 1


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (pb.ScoreUp(credit=pb.Credit(bytes=1)), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.ScoreUp(), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.ScoreUp(open=pb.Open(protocol=PROTOCOL)), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.ScoreUp(open=pb.Open(protocol=PROTOCOL, window_bytes=1 << 62)), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.ScoreUp(open=pb.Open(protocol=9, window_bytes=1)), grpc.StatusCode.UNIMPLEMENTED),
    ],
)
async def test_a_stream_that_does_not_open_properly_ends_with_a_code(first, code):
    with serve(FakeTeacher()) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = pb_grpc.TeacherStub(channel).Score()
            await call.write(first)
            with pytest.raises(grpc.RpcError) as caught:
                await call.read()
            assert caught.value.code() == code


async def test_a_teacher_behind_the_name_that_changed_is_refused():
    fake = FakeTeacher()
    async with connected(fake) as client:
        info = await client.teacher()
        other = FakeTeacher(seed=1)
        fake.embedding_VD, fake.weight_VD = other.embedding_VD, other.weight_VD
        with pytest.raises(MismatchError):
            await client.score(info, SPECS[0], BATCH)


async def test_names_are_explained():
    async with connected(FakeTeacher()) as client:
        with pytest.raises(NotFoundError, match="fake"):
            await client.teacher("other")


async def test_nobody_there():
    async with TeacherClient("127.0.0.1:1", backoff_s=QUICK, retry_for_s=0.2) as client:
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
            await client.describe()
        with pytest.raises(UnavailableError):
            await client.score(FakeTeacher().teacher_info(), SPECS[0], BATCH)


@pytest.mark.parametrize("address", ["here", "host:", ":1", "host:0", "host:99999", "host:port"])
async def test_what_is_no_address_is_refused(address):
    with pytest.raises(RequestError) as caught:
        TeacherClient(address)
    assert caught.value.value == address


async def test_a_server_that_is_no_teacher():
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with TeacherClient(f"127.0.0.1:{port}") as client:
        with pytest.raises(CapabilityError):
            await client.describe()
    await server.stop(0)


async def test_a_fault_of_the_teacher_is_named_and_not_retried():
    fake = FakeTeacher(mistake="crash")
    async with connected(fake) as client:
        with pytest.raises(ServerError, match="told to crash"):
            await client.score(await client.teacher(), SPECS[0], BATCH)
    assert fake.calls == 1


async def test_an_overloaded_server_is_asked_again_after_its_own_delay():
    class Busy(FakeTeacher):
        async def score(self, call):
            if self.calls < 2:
                self.calls += 1
                raise OverloadedError("full", retry_after_s=0.1)
            return await super().score(call)

    fake = Busy()
    async with connected(fake) as client:
        start = asyncio.get_running_loop().time()
        await client.score(await client.teacher(), SPECS[0], BATCH)
        assert asyncio.get_running_loop().time() - start >= 0.2
        assert client.stats.retries == 2


async def test_a_deadline_is_kept():
    fake = FakeTeacher(delay_s=5)
    async with connected(fake) as client:
        with pytest.raises(DeadlineError):
            await client.score(await client.teacher(), SPECS[0], BATCH, timeout_s=0.1)
        await nothing_left(client.server)


async def test_cancelling_frees_the_server():
    fake = FakeTeacher(delay_s=30)
    async with connected(fake) as client:
        task = asyncio.create_task(client.score(await client.teacher(), SPECS[0], BATCH))
        async with asyncio.timeout(30):
            while not client.server.servicer.open_requests:
                await asyncio.sleep(0.01)
        task.cancel()
        await nothing_left(client.server)


async def test_a_server_that_goes_and_comes_back_loses_nothing():
    fake = FakeTeacher(delay_s=0.3)
    server = LoopbackServer(fake).start()
    async with TeacherClient(server.address, backoff_s=QUICK) as client:
        info = await client.teacher()
        tasks = [asyncio.create_task(client.score(info, SPECS[1], big_batch(seed=i))) for i in range(3)]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(server.stop)
        await asyncio.sleep(0.2)
        await asyncio.to_thread(server.start)
        for i, task in enumerate(tasks):
            np.testing.assert_array_equal(
                (await task)["logits_NV"].array, fake.signals(SPECS[1], big_batch(seed=i))["logits_NV"].array
            )
        assert client.stats.reconnects >= 1
    await asyncio.to_thread(server.stop)


class Wire:
    """A hand-driven stream, to look at single messages."""

    def __init__(self, address, window_bytes):
        self.channel = grpc.aio.insecure_channel(address)
        self.call = pb_grpc.TeacherStub(self.channel).Score()
        self.window_bytes = window_bytes

    async def __aenter__(self):
        await self.call.write(pb.ScoreUp(open=pb.Open(protocol=PROTOCOL, window_bytes=self.window_bytes)))
        return self

    async def __aexit__(self, *exc):
        self.call.cancel()
        await self.channel.close()

    async def ask(self, request_id, batch, spec=SPECS[1], resume=None):
        request = codec.encode_call(ScoreCall(request_id, "fake", "", spec, batch))
        if resume:
            request.resume.CopyFrom(resume)
        await self.call.write(pb.ScoreUp(request=request))


async def test_of_several_edges_any_will_do():
    fake = FakeTeacher(delay_s=0.3)
    with serve(fake) as first, serve(fake) as second:
        addresses = f"{first.address}, {second.address}"
        async with TeacherClient(addresses, backoff_s=(0.01, 0.02), retry_for_s=30) as client:
            info = await client.teacher()
            tasks = [asyncio.create_task(client.score(info, SPECS[0], big_batch(1, 20, seed))) for seed in range(4)]
            while not fake.calls:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(first.stop)
            assert [answer.rows for answer in await asyncio.gather(*tasks)] == [19] * 4
            await asyncio.to_thread(second.stop)
            with pytest.raises(UnavailableError):
                await client.describe(timeout_s=1)
        async with TeacherClient(f"{first.address},{second.address}") as client:
            second.start()
            assert (await client.teacher()).name == "fake"  # though the first is gone


async def test_a_reader_that_stops_stops_the_teacher_within_its_window():
    """Without credits, no forward pass beyond the window."""
    fake = FakeTeacher()
    batch = big_batch()
    size = codec.reply_bytes(ScoreCall("", "", "", SPECS[1], batch), fake.teacher_info())
    with serve(fake) as server:
        async with Wire(server.address, window_bytes=2 * size + 10) as wire:
            for i in range(20):
                await wire.ask(f"r{i}", batch)
            await calls_of(fake, 2)
            got = 0
            while got < size:
                down = await wire.call.read()
                got += codec.payload_bytes(down.chunk) if down.HasField("chunk") else 0
            await wire.call.write(pb.ScoreUp(credit=pb.Credit(bytes=size)))
            await calls_of(fake, 3)


async def calls_of(fake, number):
    """Waits until the teacher was asked so often, and sees that it is not asked again."""
    async with asyncio.timeout(30):
        while fake.calls < number:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    assert fake.calls == number


async def test_a_broken_stream_goes_on_at_the_next_chunk():
    fake = FakeTeacher()
    batch = big_batch(sequences=40)
    call = ScoreCall("r", "fake", "", SPECS[1], batch)
    expected = [
        pb.ScoreDown.FromString(data).chunk for data, _ in codec.encode_chunks(call, 0, fake.signals(SPECS[1], batch))
    ]
    assert len(expected) > 2
    with serve(fake) as server:
        async with Wire(server.address, 64 << 20) as wire:
            await wire.ask("r", batch)
            first = (await wire.call.read()).chunk
            while not (await wire.call.read()).HasField("done"):
                pass
        async with Wire(server.address, 64 << 20) as wire:
            await wire.ask("r", batch, resume=pb.Resume(reply_id=first.reply_id, next_chunk=1))
            rest = []
            while (down := await wire.call.read()).HasField("chunk"):
                rest.append(down.chunk)
            assert [chunk.index for chunk in rest] == list(range(1, len(expected)))
            assert {chunk.reply_id for chunk in rest} == {first.reply_id}
            assert [c.tensors for c in rest] == [c.tensors for c in expected[1:]]
            assert fake.calls == 1, "the answer was kept, not computed again"
            # Another batch under the same id is another request: nothing of the kept answer may leak.
            await wire.ask("r", big_batch(seed=5), resume=pb.Resume(reply_id=first.reply_id, next_chunk=1))
            other = (await wire.call.read()).chunk
            assert other.index == 0 and other.reply_id != first.reply_id


async def test_too_many_open_requests_are_refused_with_a_delay():
    fake = FakeTeacher(delay_s=10)
    with serve(fake, limits=StreamLimits(max_open_requests=2)) as server:
        async with Wire(server.address, 1 << 20) as wire:
            for i in range(3):
                await wire.ask(f"r{i}", BATCH)
            failed = (await wire.call.read()).failed
            assert (failed.request_id, failed.error.kind) == ("r2", "OverloadedError")
            assert failed.error.retry_after_s > 0
