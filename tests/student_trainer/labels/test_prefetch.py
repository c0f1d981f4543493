"""The feed: order, bounds, failures, and what the server is left holding."""

import threading
import time

import numpy as np
import pytest

from student_trainer import interruption
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.prefetch import LabelFeed
from student_trainer.labels.service import LabelService
from student_trainer.labels.source import LabelRequest
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import CancelledRequestError, LabelError, UnavailableError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import LoopbackServer, serve

SPEC = spec_of("full", 64)


def request(number):
    rng = np.random.default_rng(number)
    return LabelRequest(
        TokenBatch.pack([rng.integers(0, 64, 30).tolist() for _ in range(2)]), (f"a:{number}", f"b:{number}")
    )


ROW_BYTES = SPEC.row_bytes(16, 4)
REPLY_BYTES = 58 * ROW_BYTES


def open_feed(address, fake, *, count=12, first=0, max_bytes=1 << 30, max_batches=100, retry_for_s=20.0, **settings):
    def connect():
        return TeacherClient(address, retry_for_s=retry_for_s, backoff_s=(0.02, 0.05), on_trouble=lambda error: None)

    return LabelFeed(
        LabelService(connect, None).source(fake.teacher_info(), SPEC),
        request,
        first=first,
        count=count,
        max_bytes=max_bytes,
        max_batches=max_batches,
        **settings,
    )


def wait_for(condition, limit_s=20.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_labels_come_by_number_whatever_the_order_of_answers():
    fake = FakeTeacher()
    with serve(fake) as server:
        feed = open_feed(server.address, fake, first=3)
        for number in range(3, 12):
            np.testing.assert_array_equal(
                feed.take(number).ready["logits_NV"].array, fake.signals(SPEC, request(number).batch)["logits_NV"].array
            )
        feed.close()
    assert fake.calls == 9, "every batch is asked for once"


@pytest.mark.parametrize(
    ("max_bytes", "max_batches", "expected"),
    [(4 * REPLY_BYTES, 100, 3), (4 * REPLY_BYTES - 1, 100, 2), (1 << 30, 2, 2), (1, 100, 1)],
)
def test_what_is_fetched_ahead_is_bounded(max_bytes, max_batches, expected):
    fake = FakeTeacher()
    with serve(fake) as server:
        feed = open_feed(server.address, fake, max_bytes=max_bytes, max_batches=max_batches)
        wait_for(lambda: fake.calls == expected)
        time.sleep(0.2)  # nothing more may come, however long one waits
        assert fake.calls == expected
        feed.take(0)
        wait_for(lambda: fake.calls == expected + 1)
        feed.close()


def test_every_copy_counts_as_long_as_it_is_there():
    """`max_bytes` is host memory: on its way an answer is there as it travels and as it will be used; then only what is used counts."""
    fake = FakeTeacher()
    gate = threading.Event()

    def prepare(signals):
        gate.wait()
        return LabelTensors.of(signals)

    with serve(fake) as server:
        feed = open_feed(server.address, fake, max_bytes=5 * REPLY_BYTES, prepare=prepare)
        wait_for(lambda: fake.calls == 2)
        assert sum(feed._held.values()) == 4 * REPLY_BYTES
        gate.set()
        wait_for(lambda: fake.calls == 4)
        wait_for(lambda: sum(feed._held.values()) == 4 * REPLY_BYTES)
        assert (
            sum(tensors.ready.nbytes for tensors in (feed._promises[n].result() for n in range(4))) == 4 * REPLY_BYTES
        )
        feed.close()


def test_what_can_never_be_taken_is_refused_and_does_not_hang():
    fake = FakeTeacher()
    with serve(fake) as server:
        feed = open_feed(server.address, fake, first=2, count=5)
        feed.take(2)
        for number, said in ((2, "has been taken"), (1, "2..4"), (5, "2..4"), (-1, "2..4")):
            with pytest.raises(ValueError, match=said):
                feed.take(number)
        feed.take(3)
        feed.close()
        with pytest.raises((CancelledRequestError, ValueError)):
            feed.take(4)


def test_a_refused_answer_is_told_once():
    fake = FakeTeacher(mistake="shifted")
    with serve(fake) as server:
        feed = open_feed(server.address, fake)
        with pytest.raises(LabelError):
            feed.take(0)
        with pytest.raises(ValueError, match="has been taken"):
            feed.take(0)
        feed.close()


def test_waiting_is_measured():
    fake = FakeTeacher(delay_s=0.3)
    with serve(fake) as server:
        feed = open_feed(server.address, fake)
        feed.take(0)
        assert feed.stats.wait_s >= 0.2
        wait_for(lambda: feed._promises[1].done())
        before = feed.stats.wait_s
        feed.take(1)
        assert feed.stats.wait_s - before < 0.2, "the second was there already"
        feed.close()


def test_a_refused_answer_fails_the_step_that_needs_it():
    fake = FakeTeacher(mistake="shifted")
    with serve(fake) as server:
        feed = open_feed(server.address, fake)
        with pytest.raises(LabelError, match="a:0"):
            feed.take(0)
        feed.close()


def test_a_teacher_that_stays_away_fails_with_its_address():
    fake = FakeTeacher()
    feed = open_feed("127.0.0.1:1", fake, retry_for_s=0.1)
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
        feed.take(0)
    feed.close()


def test_a_teacher_that_comes_back_is_waited_for():
    fake = FakeTeacher(delay_s=0.1)
    server = LoopbackServer(fake).start()
    feed = open_feed(server.address, fake, max_batches=2)
    feed.take(0)
    server.stop()
    back = threading.Timer(0.5, server.start)
    back.start()
    for number in range(1, 12):
        np.testing.assert_array_equal(
            feed.take(number).ready["logits_NV"].array, fake.signals(SPEC, request(number).batch)["logits_NV"].array
        )
    feed.close()
    back.join()
    server.stop()


def test_closing_early_leaves_nothing_on_the_server():
    fake = FakeTeacher(delay_s=0.2)
    with serve(fake) as server:
        feed = open_feed(server.address, fake, count=100)
        feed.take(0)
        feed.close()
        wait_for(lambda: server.servicer.open_requests == 0)
    assert feed._work.done()


def test_no_more_is_asked_ahead_than_hides_the_teachers_time():
    """The bounds allow a hundred; a teacher that answers at once needs a few, one that takes its time needs more."""
    asked = {}
    for name, delay_s in (("quick", 0.0), ("slow", 1.0)):
        fake = FakeTeacher(delay_s=delay_s)
        with serve(fake) as server:
            feed = open_feed(server.address, fake, count=200)
            for number in range(30):
                feed.take(number)
                time.sleep(0.1)
            asked[name] = fake.calls - 30
            feed.close()
    assert asked["quick"] < asked["slow"] < 100, asked


def test_what_is_taken_has_been_prepared_by_the_feed():
    fake = FakeTeacher()
    threads = set()

    def prepare(signals):
        threads.add(threading.current_thread())
        return LabelTensors.of(signals)

    with serve(fake) as server:
        feed = open_feed(server.address, fake, prepare=prepare)
        taken = feed.take(0)
        feed.close()
    expected = fake.signals(SPEC, request(0).batch)
    assert taken.ready.named.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(taken.ready.named[name].numpy(), tensor.array)
    assert threading.main_thread() not in threads


def test_a_failure_between_two_slices_of_a_wait_is_seen(monkeypatch):
    """What wakes a thread is told once: who does not listen just then must look at what has become of its request."""
    monkeypatch.setattr(interruption, "_SLICE_S", 0.0005)

    def gone(number):
        time.sleep(0.0005 * (number % 7))
        raise ValueError("the rows are gone")

    fake, ended = FakeTeacher(), []
    with serve(fake) as server:

        def take():
            source = LabelService(lambda: TeacherClient(server.address), None).source(fake.teacher_info(), SPEC)
            for first in range(30):
                feed = LabelFeed(source, gone, first=first, count=31, max_bytes=1 << 30, max_batches=9)
                with pytest.raises(ValueError, match="gone"):
                    feed.take(first)
                ended.append(first)
                feed.close()

        taker = threading.Thread(target=take, daemon=True)
        taker.start()
        taker.join(120)
    assert len(ended) == 30, "a take waits for ever"
