"""Labels from disk or from the teacher: exactly the missing are asked for, once, and the stored ones are used."""

import asyncio
import dataclasses

import numpy as np
import pytest

from student_trainer.labels import event_loop
from student_trainer.labels.prefetch import LabelFeed
from student_trainer.labels.service import LabelService
from student_trainer.labels.source import LabelRequest, LabelUsage
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import LabelError, ServerError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.labels.budget import files_of
from teacher_wire.labels.store import LabelStore, label_keys
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from tests.teacher_wire.labels.labels_of import assert_same_labels

SPECS = [
    spec_of("hidden", 64),
    spec_of("hidden", 64, reduction="int8"),
    spec_of("full", 64),
    spec_of("top_k", 64, k=9),
]


class Recorder(FakeTeacher):
    """Remembers what it was asked, and answers each sequence by itself, so that its bits do not depend on the company."""

    def __post_init__(self):
        super().__post_init__()
        self.asked: list[tuple[int, ...]] = []

    def signals(self, spec, batch):
        parts = []
        for b in range(batch.sequences):
            self.asked.append(tuple(batch.token_ids_T[batch.cu_lengths_B1[b] : batch.cu_lengths_B1[b + 1]].tolist()))
            if np.diff(batch.row_bounds_B1)[b]:
                parts.append(super().signals(spec, batch.select([b])))
        return type(parts[0]).join(parts)


class Fickle(Recorder):
    """Its labels differ in their last bits whenever it is asked."""

    def states(self, batch):
        return super().states(batch) * np.float32(1 + 1e-6 * len(self.asked))


def sequence(number, tokens=20):
    return np.random.default_rng(number).integers(0, 64, tokens).tolist()


def request(*numbers, **changes):
    batch = dataclasses.replace(TokenBatch.pack([sequence(n) for n in numbers]), **changes)
    return LabelRequest(batch, tuple(f"row {n}" for n in numbers))


@pytest.fixture(params=SPECS, ids=lambda spec: repr(spec.signals))
def spec(request):
    return request.param


@pytest.fixture
def store(tmp_path):
    return LabelStore(tmp_path / "labels")


def labels_of(address, fake, store, requests, spec=SPECS[0]):
    """The answers to some requests begun together, by one source, and what they used."""
    desk = LabelService(lambda: TeacherClient(address, retry_for_s=0.2, on_trouble=lambda error: None), store)

    async def ask():
        async with desk.source(fake.teacher_info(), spec) as source:
            return await asyncio.gather(*(source.labels(r) for r in requests), return_exceptions=True)

    return event_loop.run(ask()), desk.usage


def nobody():
    raise AssertionError("nothing had to be asked")


def test_exactly_the_missing_sequences_are_asked_for(store, spec):
    fake = Recorder()
    with serve(fake) as server:
        labels_of(server.address, fake, store, [request(1, 3)], spec)
        before, fake.asked = list(fake.asked), []
        (found,), usage = labels_of(server.address, fake, store, [request(0, 1, 2, 3, 4)], spec)
        (expected,), _ = labels_of(server.address, Recorder(), None, [request(0, 1, 2, 3, 4)], spec)
    assert before == [tuple(sequence(n)) for n in (1, 3)]
    assert fake.asked[:3] == [tuple(sequence(n)) for n in (0, 2, 4)]
    assert fake.calls == 3, "one request for the missing; one by the other source"
    assert_same_labels(found.signals, expected.signals)
    assert usage == LabelUsage(disk_sequences=2, disk_tokens=40, teacher_sequences=3, teacher_tokens=60)


def test_what_is_on_disk_needs_no_connection(store, spec):
    fake = Recorder()
    with serve(fake) as server:
        (first,), _ = labels_of(server.address, fake, store, [request(0, 1)], spec)
    desk = LabelService(nobody, store)
    feed = LabelFeed(
        desk.source(fake.teacher_info(), spec), lambda number: request(1 - number, number),
        first=0, count=2, max_bytes=1 << 30, max_batches=10,
    )  # fmt: skip
    backwards = first.signals.cut(request(0, 1).batch)[::-1]
    taken = [feed.take(0), feed.take(1)]
    assert_same_labels(taken[0].ready, type(first.signals).join(backwards))
    assert_same_labels(taken[1].ready, first.signals)
    feed.close()
    assert all(one.usage == LabelUsage(disk_sequences=2, disk_tokens=40) for one in taken)
    assert desk.usage == LabelUsage(disk_sequences=4, disk_tokens=80) and desk.usage.disk_share == 1.0


def test_every_sequence_is_asked_for_once_however_often_it_is_under_way(store):
    """Twice in a batch, in batches begun at the same time, and again later: the teacher's work is the unique tokens."""
    fake = Recorder(delay_s=0.1)
    with serve(fake) as server:
        requests = [request(0, 1, 0), request(1, 2), request(3), request(2, 0, 3)]
        found, usage = labels_of(server.address, fake, store, requests)
        again, _ = labels_of(server.address, fake, store, requests)
    assert sorted(fake.asked) == sorted(tuple(sequence(n)) for n in range(4))
    assert fake.tokens == 80 == usage.teacher_tokens and usage.tokens == 20 * 9
    for one, other in zip(found, again, strict=True):
        assert_same_labels(one.signals, other.signals)
    together = fake.asked.index(tuple(sequence(0)))
    assert fake.asked[together + 1] == tuple(sequence(1)), "who began first asks for what both need"


def test_a_fickle_teacher_is_believed_once(store):
    """Of two students that ask at the same time, both train on the bytes of the first; so does everybody later."""
    fake = Fickle()
    with serve(fake) as server:
        source = [
            LabelService(lambda: TeacherClient(server.address), LabelStore(store.folder)).source(
                fake.teacher_info(), SPECS[0]
            )
            for _ in range(2)
        ]

        async def together():
            async with source[0], source[1]:
                return await asyncio.gather(*(s.labels(request(0, 1)) for s in source))

        first, second = event_loop.run(together())
        assert len(fake.asked) == 4, "both asked"
        assert_same_labels(second.signals, first.signals)
        (later,), _ = labels_of(server.address, fake, store, [request(0, 1)])
        assert_same_labels(later.signals, first.signals)
        (without,), _ = labels_of(server.address, fake, None, [request(0, 1)])
        assert without.signals["hidden_ND"].array.tobytes() != first.signals["hidden_ND"].array.tobytes()


def test_damaged_labels_are_fetched_again_and_counted(store):
    fake = Recorder()
    with serve(fake) as server:
        (first,), _ = labels_of(server.address, fake, store, [request(0, 1)])
        spoilt = next(iter(sorted(store.folder.rglob("*.safetensors"))))
        data = bytearray(spoilt.read_bytes())
        data[len(data) // 2] ^= 8
        spoilt.write_bytes(data)
        fake.asked = []
        (again,), usage = labels_of(server.address, fake, store, [request(0, 1)])
    assert_same_labels(again.signals, first.signals)
    assert len(fake.asked) == 1 and store.stats.damaged == 1 and usage.disk_sequences == 1
    assert store.verify()[0].sequences == 2


def test_a_sequence_without_a_row_has_no_labels(store):
    wanted = request(0, 1, 2).batch.wanted_T.copy()
    wanted[20:40] = False
    asked = request(0, 1, 2, wanted_T=wanted)
    fake = Recorder()
    with serve(fake) as server:
        (found,), usage = labels_of(server.address, fake, store, [asked])
    assert found.signals.rows == asked.batch.rows == 38 and usage.sequences == 2
    assert fake.asked == [tuple(sequence(n)) for n in (0, 2)]


def test_named_ids_are_part_of_the_question(store):
    spec = spec_of("top_k", 64, k=4, extra=2)
    rows = request(0).batch.rows
    named = [np.tile(np.array(pair, np.int32), (rows, 1)) for pair in ((1, 2), (3, 4))]
    fake = Recorder()
    with serve(fake) as server:
        for extra in (named[0], named[1], named[0]):
            (found,), _ = labels_of(server.address, fake, store, [request(0, extra_ids_NM=extra)], spec)
            assert all(set(extra[0]) <= set(row) for row in found.signals["topk_ids_NK"].array.tolist())
    assert fake.calls == 3 and not list(files_of(store.folder)), "no later step names the same: they are not kept"


@pytest.mark.parametrize("mistake", ["nan", "foreign"])
def test_what_must_not_be_learned_from_is_not_kept(store, mistake):
    fake = Recorder(mistake=mistake)
    with serve(fake) as server:
        found, _ = labels_of(server.address, fake, store, [request(0, 1), request(1, 2)])
        assert all(isinstance(error, LabelError) for error in found), "who waited for the other's labels is told too"
        assert store.scan() == ([], 0)
        fake.mistake = ""
        found, _ = labels_of(server.address, fake, store, [request(0, 1), request(1, 2)])
    assert [answer.signals.rows for answer in found] == [38, 38]


def test_a_failed_request_is_not_remembered(store):
    fake = Recorder(mistake="crash")
    with serve(fake) as server:
        desk = LabelService(lambda: TeacherClient(server.address), store)

        async def twice():
            async with desk.source(fake.teacher_info(), SPECS[0]) as source:
                with pytest.raises(ServerError):
                    await source.labels(request(0))
                fake.mistake = ""
                return await source.labels(request(0))

        assert event_loop.run(twice()).signals.rows == 19


def test_who_gives_up_does_not_take_the_labels_from_others(store):
    """A request waits for another's sequence and is cancelled: the other goes on."""
    fake = Recorder(delay_s=0.2)
    with serve(fake) as server:
        desk = LabelService(lambda: TeacherClient(server.address), store)

        async def one_of_two():
            async with desk.source(fake.teacher_info(), SPECS[0]) as source:
                owner, waiter = (asyncio.create_task(source.labels(r)) for r in (request(0), request(0)))
                await asyncio.sleep(0.05)
                waiter.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiter
                return await owner

        assert event_loop.run(one_of_two()).signals.rows == 19


def test_labels_come_though_they_cannot_be_kept(tmp_path):
    """A folder that cannot be made stands for a full disk: one word, and all labels."""
    (tmp_path / "file").write_text("")
    told = []
    store = LabelStore(tmp_path / "file" / "labels", on_trouble=told.append)
    fake = Recorder()
    with serve(fake) as server:
        found, _ = labels_of(server.address, fake, store, [request(0, 1), request(1, 2)])
        (without,), _ = labels_of(server.address, fake, None, [request(0, 1)])
    assert_same_labels(found[0].signals, without.signals)
    assert len(told) == 1 and str(tmp_path / "file") in told[0]


def test_the_key_is_of_what_was_asked(store):
    """The files are where another program would look for them."""
    fake = Recorder()
    with serve(fake) as server:
        labels_of(server.address, fake, store, [request(0, 1)])
    keys = label_keys(fake.teacher_info().fingerprint, SPECS[0], request(0, 1).batch)
    assert {path.stem for path in store.folder.rglob("*.safetensors")} == set(keys)
