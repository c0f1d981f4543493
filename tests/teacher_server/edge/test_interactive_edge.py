"""Requests with `cache: none` and `latency: interactive` between student and edge: nothing kept, nothing hashed, nobody's bulk before them."""

import asyncio
from dataclasses import replace

import grpc
import numpy as np
import pytest

from teacher_server.config.server import StoreConfig, TenantConfig, TlsConfig
from teacher_server.edge import label_sharing
from teacher_wire import PROTOCOL
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import OverloadedError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.labels.store import LabelStore
from teacher_wire.score import asked, codec
from teacher_wire.score.outbox import Item, Outbox
from teacher_wire.score.signals import spec_of
from teacher_wire.score.window import Window
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from teacher_wire.transport.accounts import Accounts
from teacher_wire.transport.channel import Credentials
from teacher_wire.transport.stream_limits import StreamLimits
from teacher_wire.transport.turns import Turns
from teacher_wire.v2 import teacher_pb2 as pb
from teacher_wire.v2 import teacher_pb2_grpc as pb_grpc
from tests.cases.certificates import Authority
from tests.teacher_server.edge.test_server import edge

SPEC = spec_of("full", 64)
LANE = {"cache": "none", "latency": "interactive"}
BATCH = TokenBatch.pack([[1, 2, 3], [4, 5, 6, 7]])


class Held(FakeTeacher):
    """Notes its calls, and answers while `gate` is open."""

    def __post_init__(self):
        super().__post_init__()
        self.gate = asyncio.Event()
        self.gate.set()
        self.seen = []

    async def score(self, call):
        self.seen.append(call)
        await self.gate.wait()
        return await super().score(call)


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


# -------------------------------------------------------------------- the wire


def test_the_fields_survive_the_wire_and_cost_nothing_where_they_are_not_used():
    plain = ScoreCall("r", "fake", "f", SPEC, BATCH)
    request = codec.encode_call(replace(plain, **LANE))
    call = codec.decode_call(request, "t")
    assert (call.cache, call.latency, call.interactive) == ("none", "interactive", True)
    request.ClearField("cache")
    request.ClearField("latency")
    assert request.SerializeToString() == codec.encode_call(plain).SerializeToString()
    default = codec.decode_call(request, "t")
    assert (default.cache, default.latency, default.interactive) == ("shared", "bulk", False)


@pytest.mark.parametrize("field", ["cache", "latency"])
async def test_a_value_of_a_newer_student_is_refused_by_name_and_the_stream_lives_on(field):
    teacher = FakeTeacher()
    with serve(teacher) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = pb_grpc.TeacherStub(channel).Score()
            await call.write(pb.ScoreUp(open=pb.Open(protocol=PROTOCOL, window_bytes=1 << 20)))
            request = codec.encode_call(ScoreCall("a", "fake", "", SPEC, BATCH))
            await call.write(pb.ScoreUp(request=request))
            assert (await call.read()).HasField("chunk") and (await call.read()).HasField("done")
            request.request_id = "b"
            setattr(request, field, 7)
            await call.write(pb.ScoreUp(request=request))
            error = (await call.read()).failed.error
            assert (error.kind, error.field, error.value) == ("RequestError", field, "7") and "|" in error.limit
            call.cancel()
    assert teacher.calls == 1


# ---------------------------------------------------------- kept and hashed nowhere


async def test_labels_that_nobody_asks_for_again_are_hashed_and_kept_nowhere(tmp_path, monkeypatch):
    teacher, hashed, looked = Held(), [], []
    for module, name in ((label_sharing, "label_keys"), (asked, "content_key")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: hashed.append(name) or real(*a))
    for name in ("get", "keep"):
        real = getattr(LabelStore, name)
        monkeypatch.setattr(LabelStore, name, lambda *a, real=real, name=name: looked.append(name) or real(*a))
    async with edge(teacher, store=StoreConfig(folder=tmp_path)) as server, TeacherClient(server.address) as client:
        info = await client.teacher()
        first = await client.score(info, SPEC, BATCH, **LANE)
        again = await client.score(info, SPEC, BATCH, **LANE)
        assert (hashed, looked, teacher.calls) == ([], [], 2)
        store = server.counters()["store"]
        assert (store["unshared"], store["computed"], store["memory_bytes"]) == (4, 0, 0)
        assert not list(tmp_path.rglob("*.safetensors"))
        kept = await client.score(info, SPEC, BATCH, latency="interactive")  # the two fields are apart
        assert hashed and len(list(tmp_path.rglob("*.safetensors"))) == 2
        other = TokenBatch.pack([[9, 8, 7]])
        await client.score(info, SPEC, other, cache="none")
        assert (teacher.seen[-1].cache, teacher.seen[-1].latency) == ("none", "bulk")
    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(again[name].array, tensor.array)
        np.testing.assert_array_equal(kept[name].array, tensor.array)


async def test_nobody_joins_what_is_not_to_be_shared():
    teacher = Held()
    teacher.gate.clear()
    async with edge(teacher) as server, TeacherClient(server.address) as client:
        info = await client.teacher()
        tasks = [asyncio.create_task(client.score(info, SPEC, BATCH, **LANE)) for _ in range(2)]
        tasks.append(asyncio.create_task(client.score(info, SPEC, BATCH)))
        await until(lambda: len(teacher.seen) == 3)
        teacher.gate.set()
        assert [answer.rows for answer in await asyncio.gather(*tasks)] == [5] * 3
        assert server.counters()["store"]["joined"] == 0


async def test_tokens_and_bytes_count_against_the_tenants_quotas_as_ever():
    told = []
    async with edge() as server:
        server.set_tenants({"slow": TenantConfig(tokens_per_s=40)})
        client = TeacherClient(
            server.address, credentials=Credentials(tenant="slow"), retry_for_s=20, on_trouble=told.append
        )
        async with client:
            info = await client.teacher()
            await asyncio.gather(*(client.score(info, SPEC, BATCH, **LANE) for _ in range(8)))
        row = server.counters()["tenants"]["slow"]
        assert row["computed_tokens"] == 56 and row["sent_bytes"] == 8 * codec.reply_bytes(
            ScoreCall("r", "fake", "", SPEC, BATCH), info
        )
        assert told and {type(error) for error in told} == {OverloadedError}
        assert told[0].field == "tenants.slow.tokens_per_s"


async def test_a_request_that_is_taken_back_takes_its_work_and_its_bytes_back():
    teacher = Held()
    teacher.gate.clear()
    async with edge(teacher) as server, TeacherClient(server.address) as client:
        info = await client.teacher()
        task = asyncio.create_task(client.score(info, SPEC, BATCH, **LANE))
        await until(lambda: teacher.seen)
        task.cancel()
        await until(lambda: not server.counters()["open_requests"])
        held = server.counters()["held"]
        assert held["reply_bytes"] == held["kept_reply_bytes"] == 0 and teacher.calls == 0
        teacher.gate.set()
        assert (await client.score(info, SPEC, BATCH, **LANE)).rows == 5


async def test_over_tls_with_a_token(tmp_path):
    authority, tokens = Authority(tmp_path), tmp_path / "tokens"
    cert, key = authority.sign("localhost", "DNS:localhost,IP:127.0.0.1")
    tokens.write_text(f"alice {'a' * 20}\n")
    async with edge(tls=TlsConfig(cert_file=cert, key_file=key), tokens_file=tokens) as server:
        credentials = Credentials(ca_file=authority.cert, token="a" * 20)
        async with TeacherClient(server.address, credentials=credentials) as client:
            assert (await client.score(await client.teacher(), SPEC, BATCH, **LANE)).rows == 5
        assert server.counters()["tenants"]["alice"]["computed_tokens"] == 7


# ------------------------------------------------------------- broken streams


async def test_a_broken_interactive_stream_goes_on_at_the_next_chunk():
    teacher = FakeTeacher()
    batch = TokenBatch.pack([np.random.default_rng(s).integers(0, 60, 400).tolist() for s in range(40)])
    call = ScoreCall("r", "fake", "", SPEC, batch, cache="none", latency="interactive")
    with serve(teacher) as server:

        async def read(resume=None, of=call):
            async with grpc.aio.insecure_channel(server.address) as channel:
                stream = pb_grpc.TeacherStub(channel).Score()
                await stream.write(pb.ScoreUp(open=pb.Open(protocol=PROTOCOL, window_bytes=64 << 20)))
                request = codec.encode_call(of)
                if resume:
                    request.resume.CopyFrom(resume)
                await stream.write(pb.ScoreUp(request=request))
                chunks = []
                while (down := await stream.read()).HasField("chunk"):
                    chunks.append(down.chunk)
                stream.cancel()
            return chunks

        whole = await read()
        resume = pb.Resume(reply_id=whole[0].reply_id, next_chunk=1)
        rest = await read(resume)
        assert [chunk.index for chunk in rest] == list(range(1, len(whole))) and len(whole) > 2
        assert [chunk.tensors for chunk in rest] == [chunk.tensors for chunk in whole[1:]]
        assert teacher.calls == 1, "the answer was kept for this, and not computed again"
        other = replace(call, batch=TokenBatch.pack([[1, 2, 3]]))
        assert (await read(resume, other))[0].reply_id != whole[0].reply_id
        assert [chunk.index for chunk in await read()] == list(range(len(whole)))
        assert teacher.calls == 3, "without a chunk to go on from it is another request"


async def test_a_server_that_comes_back_is_asked_again():
    teacher = FakeTeacher(delay_s=0.2)
    with serve(teacher) as server:
        async with TeacherClient(server.address, backoff_s=(0.02, 0.05), retry_for_s=30) as client:
            info = await client.teacher()
            task = asyncio.create_task(client.score(info, SPEC, BATCH, **LANE))
            await until(lambda: teacher.calls or client.open_requests)
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(server.start)
            assert (await task).rows == 5


# ------------------------------------------- before bulk, at every place where one waits


async def test_in_a_full_window_an_interactive_request_is_next():
    teacher = Held()
    teacher.gate.clear()
    size = codec.reply_bytes(ScoreCall("", "", "", SPEC, BATCH), teacher.teacher_info())
    async with edge(teacher) as server, TeacherClient(server.address, window_bytes=2 * size + 10) as client:
        async with asyncio.timeout(20):
            info = await client.teacher()
            batches = [TokenBatch.pack([[n, 2, 3], [n, 5, 6, 7]]) for n in range(6)]  # of which no two are shared
            tasks = [asyncio.create_task(client.score(info, SPEC, batch)) for batch in batches]
            await until(lambda: len(teacher.seen) == 2 and server.counters()["open_requests"] == 6)
            tasks.append(asyncio.create_task(client.score(info, SPEC, BATCH, **LANE)))
            await until(lambda: server.counters()["open_requests"] == 7)
            teacher.gate.set()
            await asyncio.gather(*tasks)
    assert [call.latency for call in teacher.seen].index("interactive") == 2


async def test_what_may_overtake_does_so_within_a_bound():
    turns, order = Turns(), []

    def join(name, *, first):
        turns.join(1, first=first).add_done_callback(lambda _: order.append(name))

    join("bulk", first=False)
    for number in range(20):
        join(number, first=True)
    while turns.next_size is not None:
        turns.let_in()
    await asyncio.sleep(0)
    assert order == [*range(8), "bulk", *range(8, 20)]


async def test_turns_that_were_taken_back_hold_nobody_up():
    window = Window(10)
    await window.take(10)
    tasks = [asyncio.create_task(window.take(6, first=first)) for first in (False, True, False)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    tasks[0].cancel()
    await asyncio.gather(*tasks[:2], return_exceptions=True)
    window.give_back(10)
    await tasks[2]
    assert window.free == 4
    window.give_back(6)
    assert window.free == 10


async def test_of_a_tenants_held_bytes_an_interactive_reply_is_counted_first():
    accounts = Accounts(StreamLimits(max_tenant_reply_held_bytes=10, unproven_reply_held_bytes=10))
    account = accounts.enter("t")
    await accounts.hold_reply(account, 10)
    bulk = asyncio.create_task(accounts.hold_reply(account, 10))
    await asyncio.sleep(0)
    quick = asyncio.create_task(accounts.hold_reply(account, 4, first=True))
    await asyncio.sleep(0)
    accounts.drop_reply(account, 10)
    await quick
    assert not bulk.done() and account.reply_bytes == 4
    accounts.drop_reply(account, 4)
    await bulk
    assert account.reply_bytes == accounts.total.reply_bytes == 10


async def test_chunks_of_interactive_replies_leave_first_and_the_end_last():
    out = Outbox()
    out.put(Item(b"a"), first=False)
    out.end()
    out.put(Item(b"b"), first=True)
    out.put(Item(b"c"), first=True)
    out.put(Item(b"d"), first=False)
    assert len(out) == 5
    assert [(item := await out.get()) and item.data for _ in range(5)] == [b"b", b"c", b"a", b"d", None]
    assert list(out.unsent()) == []


async def test_of_what_a_client_holds_back_interactive_requests_go_up_first():
    """A server that refuses is asked for fewer at a time; what waits at the student then is not sent in its order alone."""
    async with TeacherClient("127.0.0.1:1") as client:
        requests = client._requests
        info = FakeTeacher().teacher_info()
        requests._pace.wait_s = lambda now: float("inf")
        requests._stream = asyncio.create_task(asyncio.sleep(60))
        tasks = [asyncio.create_task(client.score(info, SPEC, BATCH, latency=lane)) for lane in ("bulk", "interactive")]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(requests._backlog) == 2 and requests._pending[min(requests._backlog)[2]].call.interactive
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
