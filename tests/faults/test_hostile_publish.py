"""Publishers that do not mean well, or have bad luck: nothing of theirs is served, kept or in anybody's way."""

import asyncio
import errno
import json
import shutil
import struct
import threading
from dataclasses import replace

import grpc
import pytest

from teacher_server.edge import publishing as publishing_edge
from teacher_server.publishing import receiving, revisions
from teacher_wire.core.errors import (
    CapabilityError,
    ForbiddenError,
    LimitError,
    MismatchError,
    NotFoundError,
    OverloadedError,
    RequestError,
    ServerError,
    UnavailableError,
)
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.publish import codec
from teacher_wire.publish.messages import RevisionFile
from teacher_wire.transport import status_table
from teacher_wire.transport.channel import CLIENT_OPTIONS, Credentials
from teacher_wire.v2 import teacher_pb2_grpc as pb_grpc
from tests.published import publication_of, publishing
from tests.tiny import make_model

MIDDLE = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def base(model_factory):
    return model_factory("qwen2", seed=5)


@pytest.fixture
def student(model_factory):
    return model_factory("qwen2", seed=6)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(codec, "PIECE_BYTES", 4096)


def client_of(server, tenant="trainer", retry_for_s=0.0, **options):
    return TeacherClient(
        server.edge.address,
        credentials=Credentials(tenant=tenant),
        retry_for_s=retry_for_s,
        backoff_s=(0.01, 0.02),
        **options,
    )


async def publish(server, model, tenant="trainer", *, sources=None, **changes):
    publication, found = publication_of(model, **changes)
    async with client_of(server, tenant) as client:
        return await client.publish(publication, sources or found)


async def raw(server, *messages, tenant="trainer", end=True):
    """What the server says to these messages, and how it ends the call."""
    said, error = [], None
    async with grpc.aio.insecure_channel(server.edge.address, options=CLIENT_OPTIONS) as channel:
        call = pb_grpc.TeacherStub(channel).Publish(metadata=(("lyceum-tenant", tenant),))
        try:
            for message in messages:
                await call.write(message)
            if end:
                await call.done_writing()
            async for down in call:
                said.append(down)
        except grpc.RpcError as problem:
            error = status_table.from_rpc(problem, "server")
        except asyncio.InvalidStateError:
            try:
                await call.read()
            except grpc.RpcError as problem:
                error = status_table.from_rpc(problem, "server")
    return said, error


async def released(server):
    """Waits until the call of a publisher who has left lets go of the teacher: its thread works to the end."""
    async with asyncio.timeout(20):
        while True:
            with server.revisions.locked() as free:
                if free:
                    return
            await asyncio.sleep(0.01)


def nothing_left(server):
    assert server.folders() == set() and server.revisions.wanted("") == []
    assert not server.incoming.exists() and server.deployed == []


async def test_a_revision_goes_live_is_named_and_is_not_sent_again(base, student, tmp_path):
    publication, sources = publication_of(student)
    stages = []
    async with publishing(tmp_path, base) as server, client_of(server) as client:
        fingerprint = await client.publish(
            publication, sources, lambda stage, sent, whole: stages.append((stage, sent))
        )
        assert fingerprint == (await server.edge._gate.describe())[0].fingerprint or len(fingerprint) == 64
        folder = server.revisions.path(publication.revision)
        assert server.deployed == [publication.revision]
        assert stages[0] == ("sending", min(publication.bytes, codec.PIECE_BYTES))
        for name in ("config.json", "tokenizer.json"):
            assert (folder / name).read_bytes() == (base / name).read_bytes(), "the server's own"
        assert (folder / "model.safetensors").read_bytes() == sources[0].read_bytes()
        assert json.loads((folder / "lyceum-revision.json").read_text())["tenant"] == "trainer"
        missing = [tmp_path / "nowhere"]  # nothing is read: all of it is there
        with pytest.raises(FileNotFoundError):
            await client.publish(replace(publication, files=publication.files), missing)
        await released(server)
        assert await client.publish(publication, sources) == fingerprint


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("../../etc/passwd", "files.0.name"),
        ("/tmp/model.safetensors", "files.0.name"),
        ("sub/model.safetensors", "files.0.name"),
        ("model.safetensors\n", "files.0.name"),
        ("pytorch_model.bin", "files.0.name"),
        ("modeling_evil.py", "files.0.name"),
        ("config.json", "files.0.name"),
        (".incoming", "files.0.name"),
        ("wanted.json", "files.0.name"),
        ("model-1-of-2.safetensors", "files.0.name"),
        ("x" * 10_000, "files.0.name"),
        ("", "files.0.name"),
    ],
)
async def test_only_weights_by_their_own_names(base, student, tmp_path, name, field):
    publication, _ = publication_of(student)
    files = (replace(publication.files[0], name=name),)
    async with publishing(tmp_path, base) as server:
        _, error = await raw(server, codec.encode_open(replace(publication, files=files)))
        assert isinstance(error, RequestError) and error.field == field and len(str(error)) < 400
        nothing_left(server)


@pytest.mark.parametrize(
    ("spoil", "kind", "field"),
    [
        (lambda o: o.ClearField("files"), LimitError, "files"),
        (lambda o: o.files.extend([o.files[0]]), RequestError, "files"),
        (lambda o: o.files.extend([o.files[0]] * 1000), LimitError, "files"),
        (lambda o: setattr(o.files[0], "bytes", 9), RequestError, "files.0.bytes"),
        (lambda o: setattr(o.files[0], "bytes", 2**63), LimitError, "publish.max_gb"),
        (lambda o: setattr(o.files[0], "sha256", "F" * 64), RequestError, "files.0.sha256"),
        (lambda o: setattr(o, "tokenizer_sha256", ""), RequestError, "tokenizer_sha256"),
        (lambda o: setattr(o, "tokenizer_sha256", "0" * 64), MismatchError, "tokenizer_sha256"),
        (lambda o: setattr(o, "note", "a\nb"), RequestError, "note"),
        (lambda o: setattr(o, "teacher", "you"), NotFoundError, "teacher"),
        (lambda o: setattr(o, "config_json", b" " * (2 << 20)), LimitError, "config_json"),
        (lambda o: setattr(o, "config_json", b"[" * 200_000), RequestError, "config_json"),
        (lambda o: setattr(o, "config_json", b"[]"), RequestError, "config_json"),
        (lambda o: setattr(o, "config_json", b"{}"), MismatchError, "config_json.model_type"),
        (lambda o: change(o, auto_map={"AutoModel": "evil.Evil"}), RequestError, "config_json.auto_map"),
        (lambda o: change(o, hidden_size=64), MismatchError, "config_json.hidden_size"),
        (lambda o: change(o, model_type="llama"), MismatchError, "config_json.model_type"),
        (lambda o: change(o, num_attention_heads=2), MismatchError, "config_json.num_attention_heads"),
        (lambda o: change(o, rms_norm_eps=1e-3), MismatchError, "config_json.rms_norm_eps"),
    ],
)
async def test_a_publication_that_is_none_is_refused_before_a_byte(base, student, tmp_path, spoil, kind, field):
    message = codec.encode_open(publication_of(student)[0])
    spoil(message.open)
    async with publishing(tmp_path, base) as server:
        said, error = await raw(server, message)
        assert said == [] and type(error) is kind and error.field == field, error
        nothing_left(server)


def change(opened, **keys):
    opened.config_json = json.dumps({**json.loads(opened.config_json), **keys}).encode()


async def test_keys_that_change_nothing_are_free(base, student, tmp_path):
    message = codec.encode_open(publication_of(student)[0])
    change(message.open, dtype="bfloat16", use_cache=False, transformers_version="9", a_key_of_the_future=1)
    async with publishing(tmp_path, base) as server:
        said, error = await raw(server, message)
        assert [down.stage for down in said] == [codec.RECEIVING]
        assert isinstance(error, RequestError) and "not whole" in str(error)


async def test_who_may_not(base, student, tmp_path):
    async with publishing(tmp_path, base) as server:
        for tenant in ("stranger", "Trainer", "trainer.x", ""):
            with pytest.raises(ForbiddenError) as caught:
                await publish(server, student, tenant)
            assert caught.value.field == "publish.tenants" and "'trainer'" not in str(caught.value)
        server.config = server.config.model_copy(update={"publish": None})
        server.news("")
        with pytest.raises(CapabilityError):
            await publish(server, student)
        nothing_left(server)


async def test_a_token_says_who_publishes(base, student, tmp_path):
    """Not the name that a caller gives itself."""
    tokens, ours, others = tmp_path / "tokens", "t" * 20, "o" * 20
    tokens.write_text(f"trainer {ours}\nother {others}\n")
    publication, sources = publication_of(student)
    async with publishing(tmp_path, base, edge={"tokens_file": str(tokens)}) as server:

        def client(token, **named):
            return TeacherClient(server.edge.address, credentials=Credentials(token=token, **named), retry_for_s=0)

        async with client(others) as stranger:
            with pytest.raises(ForbiddenError):
                await stranger.publish(publication, sources)
        nothing_left(server)
        async with client(ours) as trainer:
            assert await trainer.publish(publication, sources)


async def test_too_large_is_refused_by_what_was_announced_and_never_grows_beyond_it(base, student, tmp_path):
    publication, sources = publication_of(student)
    open_, size = codec.encode_open(publication), publication.files[0].bytes
    async with publishing(tmp_path, base, max_gb=(size - 1) / 2**30) as server:
        with pytest.raises(LimitError) as caught:
            await publish(server, student)
        assert (caught.value.field, caught.value.value) == ("publish.max_gb", str(size))
        nothing_left(server)
    small = replace(publication, files=(replace(publication.files[0], bytes=100),))
    async with publishing(tmp_path / "other", base) as server:
        _, error = await raw(server, codec.encode_open(small), codec.encode_piece(0, 0, sources[0].read_bytes()[:101]))
        assert isinstance(error, LimitError) and error.field == "data.data"
        for piece in (
            codec.encode_piece(0, 1, b"x"),
            codec.encode_piece(1, 0, b"x"),
            codec.encode_piece(0, 0, b""),
            open_,
        ):
            _, error = await raw(server, open_, piece)
            assert isinstance(error, RequestError), piece
        _, error = await raw(server, codec.encode_piece(0, 0, b"x"))
        assert error.field == "open"
        assert server.folders() == set()


async def test_a_message_that_is_none(base, tmp_path):
    async with publishing(tmp_path, base) as server, grpc.aio.insecure_channel(server.edge.address) as channel:
        call = channel.stream_stream("/teacher_wire.v2.Teacher/Publish")(metadata=(("lyceum-tenant", "trainer"),))
        await call.write(b"\xff\xff\xff")
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


def rewritten(model, folder, edit):
    """A copy of a model whose safetensors file was changed: edit(header, body) -> bytes."""
    copy = shutil.copytree(model, folder)
    data = (model / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    written = edit(json.loads(data[8 : 8 + length]), data[8 + length :])
    (copy / "model.safetensors").write_bytes(written)
    return copy


def with_header(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    ("edit", "kind", "named"),
    [
        (lambda h, b: with_header({**h, "evil": h["model.norm.weight"]}, b), MismatchError, "evil"),
        (lambda h, b: with_header({k: v for k, v in h.items() if k != MIDDLE}, b), MismatchError, MIDDLE),
        (lambda h, b: with_header({**h, "model.norm.weight": {**h["model.norm.weight"], "shape": [16]}}, b), MismatchError, "shape"),
        (lambda h, b: with_header({**h, "model.norm.weight": {**h["model.norm.weight"], "dtype": "I64"}}, b), MismatchError, "I64"),
        (lambda h, b: with_header(h, b[:-1]), RequestError, "header says"),
        (lambda h, b: with_header(h, b + b"#!/bin/sh"), RequestError, "header says"),
        (lambda h, b: struct.pack("<Q", 2**62) + b"{}" + b, RequestError, "no safetensors header"),
        (lambda h, b: struct.pack("<Q", 200_000) + b"[" * 200_000, RequestError, "no safetensors header"),
        (lambda h, b: b"\x80\x04\x95pickle would be here" + b, RequestError, "damaged"),
    ],
)  # fmt: skip
async def test_weights_that_do_not_fit_are_refused_and_deleted(base, student, tmp_path, edit, kind, named):
    bad = rewritten(student, tmp_path / "bad", edit)
    async with publishing(tmp_path, base) as server:
        with pytest.raises(kind) as caught:
            await publish(server, bad)
        assert named in str(caught.value) and str(tmp_path) not in str(caught.value), caught.value
        nothing_left(server)
        await publish(server, student)  # and nobody is in the way


async def test_a_model_of_another_shape(base, tmp_path):
    other = make_model(tmp_path / "wide", hidden=64)
    async with publishing(tmp_path, base) as server:
        with pytest.raises(MismatchError):
            await publish(server, other)
        with pytest.raises(MismatchError) as caught:  # that lies about it
            await publish(server, other, config_json=(base / "config.json").read_bytes())
        assert "shape" in str(caught.value)
        nothing_left(server)


async def test_other_bytes_than_announced(base, student, tmp_path):
    publication, _ = publication_of(student)
    lie = RevisionFile("model.safetensors", publication.files[0].bytes, "0" * 64)
    async with publishing(tmp_path, base) as server:
        with pytest.raises(RequestError) as caught:
            await publish(server, student, files=(lie,))
        assert caught.value.field == "files.0.sha256"
        nothing_left(server)


async def test_a_call_that_is_cut_off_is_taken_up_where_it_was(base, student, tmp_path, small_pieces):
    publication, sources = publication_of(student)
    data = sources[0].read_bytes()
    async with publishing(tmp_path, base) as server:
        _, error = await raw(
            server,
            codec.encode_open(publication),
            codec.encode_piece(0, 0, data[:5000]),
            codec.encode_piece(0, 5000, data[5000:9000]),
        )
        assert isinstance(error, RequestError) and "not whole" in str(error)
        stages = []
        async with client_of(server) as client:
            await client.publish(publication, sources, lambda stage, sent, whole: stages.append(sent))
        assert stages[0] == 9000 + 4096, "nothing is sent twice"
        assert (server.revisions.path(publication.revision) / "model.safetensors").read_bytes() == data


async def test_a_client_that_is_killed_frees_the_way_for_others(base, student, model_factory, tmp_path, small_pieces):
    """And what it left is deleted with the first other revision."""
    publication, sources = publication_of(student)
    data = sources[0].read_bytes()
    async with publishing(tmp_path, base, tenants=["trainer", "other"]) as server:
        hanging = asyncio.create_task(
            raw(server, codec.encode_open(publication), codec.encode_piece(0, 0, data[:5000]), end=False)
        )
        async with asyncio.timeout(20):
            while not (server.incoming / "model.safetensors").exists():
                await asyncio.sleep(0.01)
        for tenant in ("trainer", "other"):
            with pytest.raises(OverloadedError) as caught:
                await publish(server, student, tenant)
            assert caught.value.retry_after_s > 0
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)
        another = model_factory("qwen2", seed=7)
        async with client_of(server, "other", retry_for_s=20) as client:
            other, its = publication_of(another)
            await client.publish(other, its)
        assert server.folders() == {other.revision} and not server.incoming.exists()


async def test_a_publisher_that_says_nothing_more_is_dropped(base, student, tmp_path):
    publication, _ = publication_of(student)
    async with publishing(tmp_path, base) as server:
        server.edge._servicer._limits = replace(server.edge._servicer._limits, stall_s=0.2)
        _, error = await raw(server, codec.encode_open(publication), end=False)
        assert isinstance(error, UnavailableError) and error.field == "stall_s"
    async with publishing(tmp_path / "slow", base, upload_s=1e-6) as server:
        _, error = await raw(server, codec.encode_open(publication), codec.encode_piece(0, 0, b"x"), end=False)
        assert isinstance(error, UnavailableError) and error.field == "publish.upload_s"


async def test_a_full_disk_is_said_frees_what_came_and_passes(base, student, tmp_path, monkeypatch):
    class Full:
        def __init__(self, file, code):
            self._file, self._code = file, code

        def write(self, data):
            raise OSError(self._code, "No space left on device")

        def __getattr__(self, name):
            return getattr(self._file, name)

    async with publishing(tmp_path, base) as server:
        usage = shutil.disk_usage(tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(receiving.shutil, "disk_usage", lambda path: usage._replace(free=1000))
            with pytest.raises(OverloadedError) as caught:
                await publish(server, student)
            assert caught.value.field == "publish.folder" and caught.value.limit == "1000"
        for code in (errno.ENOSPC, errno.EDQUOT):
            with monkeypatch.context() as patched:
                grow = receiving.Receiving._path
                patched.setattr(
                    receiving.Receiving,
                    "_path",
                    lambda self, number, code=code, grow=grow: _Opened(grow(self, number), Full, code),
                )
                with pytest.raises(OverloadedError) as caught:
                    await publish(server, student)
            assert "No space" in str(caught.value) and not server.incoming.exists()
        assert server.deployed == []
        await publish(server, student)


class _Opened:
    def __init__(self, path, wrap, code):
        self._path, self._wrap, self._code = path, wrap, code

    def open(self, mode):
        return self._wrap(self._path.open(mode), self._code)


async def test_a_revision_that_cannot_come_up(base, student, model_factory, tmp_path):
    async with publishing(tmp_path, base) as server:
        server.refuses = True
        with pytest.raises(ServerError) as caught:
            await publish(server, student)
        assert "it does not load" in str(caught.value) and "the revision before stays" in str(caught.value)
        server.refuses = False
        await publish(server, model_factory("qwen2", seed=7))


async def test_a_revision_that_is_deleted_at_that_moment_is_sent_again(base, student, tmp_path):
    """`up` deletes without asking edges: what it found too old may be what somebody wants again."""
    publication, sources = publication_of(student)
    async with publishing(tmp_path, base) as server:
        await publish(server, student)
        folder = server.revisions.path(publication.revision)
        server.idle, server.deployed = True, []
        server.news("")
        sent = []
        async with client_of(server, retry_for_s=20) as client:
            waiting = asyncio.create_task(
                client.publish(publication, sources, lambda stage, n, whole: sent.append(stage))
            )
            async with asyncio.timeout(20):
                while not any("replicas" in stage for stage in sent):
                    await asyncio.sleep(0.01)
            assert "sending" not in sent
            shutil.rmtree(folder)
            server.idle = False
            async with asyncio.timeout(20):
                assert await waiting
        assert "sending" in sent and folder.is_dir()


async def test_a_publisher_that_leaves_while_it_is_deployed_changes_nothing(base, student, tmp_path):
    publication, sources = publication_of(student)
    async with publishing(tmp_path, base) as server:
        server.idle = True
        async with client_of(server) as client:
            gone = asyncio.create_task(client.publish(publication, sources))
            async with asyncio.timeout(20):
                while server.folders() != {publication.revision}:
                    await asyncio.sleep(0.01)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
        server.idle = False
        async with asyncio.timeout(20):
            while server.deployed != [publication.revision]:
                await asyncio.sleep(0.01)


async def test_a_revision_is_deployed_although_its_publisher_left_before_it_was_wanted(
    base, student, tmp_path, monkeypatch
):
    """Whole is wanted: the two are one step, also to somebody who cancels in the midst of it."""
    publication, sources = publication_of(student)
    whole, left = threading.Event(), threading.Event()
    publish = revisions.Revisions.publish

    def slow(self, staged, revision):
        publish(self, staged, revision)
        whole.set()
        assert left.wait(20)

    monkeypatch.setattr(revisions.Revisions, "publish", slow)
    async with publishing(tmp_path, base) as server:
        async with client_of(server) as client:
            gone = asyncio.create_task(client.publish(publication, sources))
            assert await asyncio.to_thread(whole.wait, 20)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
        with server.revisions.locked() as free:
            assert not free, "the lock is held while the thread still works"
        left.set()
        async with asyncio.timeout(20):
            while server.deployed != [publication.revision]:
                await asyncio.sleep(0.01)


async def test_a_publisher_that_leaves_amid_a_write_is_taken_up_where_that_write_ended(
    base, student, tmp_path, monkeypatch, small_pieces
):
    publication, sources = publication_of(student)
    writing, left = threading.Event(), threading.Event()
    write = receiving.Receiving.write

    def slow(self, number, data):
        writing.set()
        assert left.wait(20)
        write(self, number, data)

    async with publishing(tmp_path, base) as server, client_of(server) as client:
        with monkeypatch.context() as patched:
            patched.setattr(receiving.Receiving, "write", slow)
            gone = asyncio.create_task(client.publish(publication, sources))
            assert await asyncio.to_thread(writing.wait, 20)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            with server.revisions.locked() as free:
                assert not free, "the lock is held while the thread still writes"
            left.set()
            await released(server)
        sent = []
        await client.publish(publication, sources, lambda stage, n, whole: sent.append(n))
        assert sent[0] > codec.PIECE_BYTES, "the piece that was under way was kept, and not sent again"
        assert server.deployed == [publication.revision]


async def test_work_that_is_cancelled_twice_is_done_before_either_is_raised():
    """As a timeout does to a call whose client goes at the same time."""
    begun, go, done = threading.Event(), threading.Event(), threading.Event()

    def work():
        begun.set()
        assert go.wait(20)
        done.set()

    task = asyncio.create_task(publishing_edge._to_its_end(work))
    assert await asyncio.to_thread(begun.wait, 20)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.05)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()


async def test_an_edge_that_goes_down_does_not_wait_for_a_deployment(base, student, tmp_path):
    publication, sources = publication_of(student)
    async with publishing(tmp_path, base) as server:
        server.idle = True
        async with client_of(server) as client:
            waiting = asyncio.create_task(client.publish(publication, sources))
            async with asyncio.timeout(20):
                while server.folders() != {publication.revision}:
                    await asyncio.sleep(0.01)
            await server.edge.drain()
            with pytest.raises(UnavailableError):
                await waiting


async def test_a_server_without_revisions_says_so(base, student):
    from teacher_wire.testing.fake_teacher import FakeTeacher
    from teacher_wire.testing.loopback import serve

    publication, sources = publication_of(student)
    with serve(FakeTeacher()) as server:
        async with TeacherClient(server.address, retry_for_s=0) as client:
            with pytest.raises(CapabilityError):
                await client.publish(publication, sources)


async def test_a_question_whether_it_would_be_taken_leaves_nothing(base, student, tmp_path):
    """What a student asks before its first step, when it has no weights to send."""
    publication, _ = publication_of(student, check_only=True)
    async with publishing(tmp_path, base) as server:
        async with client_of(server) as client:
            assert await client.publish(publication, []) == ""
            with pytest.raises(MismatchError):
                await client.publish(replace(publication, tokenizer_sha256="0" * 64), [])
        async with client_of(server, "stranger") as client:
            with pytest.raises(ForbiddenError):
                await client.publish(publication, [])
        nothing_left(server)
