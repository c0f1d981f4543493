"""Several teachers in one feed: what is asked, what is ready, what each policy does while one is away, and who is waited for."""

import threading
import time
from functools import partial

import numpy as np
import pytest

from student_trainer.errors import TeacherAwayError
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.joined import lane
from student_trainer.labels.joined.answer import AskedAll, AskedOne, is_enough, shares
from student_trainer.labels.joined.feed import JoinedFeed
from student_trainer.labels.joined.lane import AskedTeacher, patience_s
from student_trainer.labels.service import LabelService
from student_trainer.labels.source import LabelRequest
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import LabelError, MismatchError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.labels.store import LabelStore
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import LoopbackServer, serve

SPEC = spec_of("full", 64)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lane, "AWAY_S", 0.2)
    monkeypatch.setattr(lane, "PROBE_S", 0.05)


def request(number, sequences=(0, 1)):
    rng = np.random.default_rng(number)
    ids = [rng.integers(0, 64, 12).tolist() for _ in range(2)]
    names = (f"a:{number}", f"b:{number}")
    return LabelRequest(TokenBatch.pack([ids[b] for b in sequences]), tuple(names[b] for b in sequences))


def asked(number, by_name):
    """Two sequences a micro-batch; each teacher is asked about those that `by_name` says."""
    every = {name: AskedOne(tuple(who), request(number, tuple(who))) for name, who in by_name.items() if who}
    return AskedAll((f"a:{number}", f"b:{number}"), every)


def teacher(name, address, fake, *, weight=1.0, policy="reweight", retry_s=30.0, store=None):
    def connect():
        patience = patience_s(policy, retry_s)
        return TeacherClient(address, retry_for_s=patience, backoff_s=(0.02, 0.05), on_trouble=lambda error: None)

    source = LabelService(connect, store).source(fake.teacher_info(), SPEC)
    return AskedTeacher(name, weight, policy, retry_s, source)


def open_feed(teachers, by_name, *, count=6, told=None, **settings):
    settings = {"max_bytes": 1 << 30, "max_batches": 100} | settings
    return JoinedFeed(
        teachers, partial(asked, by_name=by_name), first=0, count=count, prepare=LabelTensors.of,
        tell=([] if told is None else told).append, **settings,
    )  # fmt: skip


def wait_for(condition, limit_s=30.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_micro_batch_holds_what_each_teacher_says_of_its_own_sequences():
    fakes = {"one": FakeTeacher(seed=1), "two": FakeTeacher(seed=2)}
    by_name = {"one": (0, 1), "two": (1,)}
    seen = []
    with serve(fakes["one"]) as first, serve(fakes["two"]) as second:
        teachers = [teacher("one", first.address, fakes["one"]), teacher("two", second.address, fakes["two"])]
        feed = open_feed(teachers, by_name, on_answer=lambda number, answer: seen.append((number, answer)))
        for number in range(6):
            taken = feed.take(number)
            assert list(taken.ready.by_name) == ["one", "two"] and not taken.ready.missing
            for name, fake in fakes.items():
                answer = taken.ready.by_name[name]
                assert answer.sequences == by_name[name]
                expected = fake.signals(SPEC, request(number, by_name[name]).batch)["logits_NV"].array
                np.testing.assert_array_equal(answer.labels.named["logits_NV"].numpy(), expected)
            assert taken.usage.teacher_sequences == 3
            assert taken.ready.labelled_by(0) == ("one",) and taken.ready.labelled_by(1) == ("one", "two")
        feed.close()
    assert [number for number, _ in seen] == list(range(6))
    assert fakes["one"].calls == fakes["two"].calls == 6


def test_bytes_of_all_teachers_count_together():
    fakes = [FakeTeacher(seed=1), FakeTeacher(seed=2)]
    with serve(fakes[0]) as first, serve(fakes[1]) as second:
        teachers = [teacher("one", first.address, fakes[0]), teacher("two", second.address, fakes[1])]
        one = sum(t.source.peak_bytes(request(0)) for t in teachers)
        feed = open_feed(teachers, {"one": (0, 1), "two": (0, 1)}, max_bytes=one)
        wait_for(lambda: sum(fake.calls for fake in fakes) == 2)
        held = feed.take(0).ready.nbytes
        assert held == 2 * fakes[0].signals(SPEC, request(0).batch)["logits_NV"].array.nbytes + 4 * 22 * 4
        wait_for(lambda: sum(fake.calls for fake in fakes) == 4)
        feed.close()


def test_nobody_is_asked_about_a_micro_batch_of_nobody():
    fake = FakeTeacher()
    with serve(fake) as server:
        feed = open_feed([teacher("one", server.address, fake)], {"one": ()}, count=2)
        assert not feed.take(0).ready.by_name and feed.take(1).ready.labelled_by(0) == ()
        feed.close()
    assert fake.calls == 0


def test_a_teacher_that_is_away_is_done_without_and_used_again_when_it_is_back():
    one, two = FakeTeacher(seed=1), FakeTeacher(seed=2)
    told = []
    with serve(one) as first:
        other = LoopbackServer(two).start()
        teachers = [teacher("one", first.address, one, weight=0.4), teacher("two", other.address, two, weight=0.6)]
        feed = open_feed(teachers, {"one": (0, 1), "two": (1,)}, count=400, told=told, max_batches=1)
        assert feed.take(0).ready.labelled_by(1) == ("one", "two")
        other.stop()
        numbers = iter(range(1, 400))
        lonely = next(answer for number in numbers if (answer := feed.take(number).ready).missing)
        assert lonely.missing == {"two": (1,)} and lonely.labelled_by(1) == ("one",)
        assert lonely.missed_by(1) == ("two",) and lonely.missed_by(0) == ()
        assert len(told) == 1 and "'two' is away" in told[0]
        assert all(feed.take(next(numbers)).ready.missing for _ in range(3))
        assert len(told) == 1, "it is said once"
        again = LoopbackServer(two, port=other.port).start()
        wait_for(lambda: len(told) == 2)
        assert "'two' is back" in told[1]
        answers = [feed.take(next(numbers)).ready for _ in range(3)]  # one may have been asked while it was away
        assert not answers[-1].missing and answers[-1].labelled_by(1) == ("one", "two")
        feed.close()
        again.stop()


def test_it_is_waited_for_where_the_others_weigh_too_little():
    """At 0.2 of the whole the light teacher alone is not learned from: the micro-batch waits until the heavy one is back."""
    light, heavy = FakeTeacher(seed=1), FakeTeacher(seed=2)
    with serve(light) as first:
        other = LoopbackServer(heavy).start()
        other.stop()
        teachers = [
            teacher("light", first.address, light, weight=0.2),
            teacher("heavy", other.address, heavy, weight=0.8),
        ]
        told, taken = [], []
        feed = open_feed(teachers, {"light": (0, 1), "heavy": (0,)}, count=1, told=told)
        thread = threading.Thread(target=lambda: taken.append(feed.take(0)))
        thread.start()
        wait_for(lambda: told)
        time.sleep(0.2)
        assert not taken
        again = LoopbackServer(heavy, port=other.port).start()
        thread.join(30)
        assert taken[0].ready.labelled_by(0) == ("light", "heavy") and not taken[0].ready.missing
        feed.close()
        again.stop()


@pytest.mark.parametrize(
    ("policy", "retry_s", "weight", "said"),
    [
        ("fail", 300.0, 1.0, "when_missing=fail"),
        ("wait", 0.3, 1.0, "for retry_s=0.3 seconds"),
        ("reweight", 0.5, 9.0, "less than 0.3 of the weight"),
    ],
)
def test_who_cannot_be_done_without_ends_the_run_by_name(policy, retry_s, weight, said):
    one, two = FakeTeacher(seed=1), FakeTeacher(seed=2)
    with serve(one) as first:
        other = LoopbackServer(two).start()
        other.stop()
        teachers = [
            teacher("one", first.address, one),
            teacher("two", other.address, two, policy=policy, retry_s=retry_s, weight=weight),
        ]
        feed = open_feed(teachers, {"one": (0, 1), "two": (0, 1)})
        with pytest.raises(TeacherAwayError, match=f"'two' has not answered.*{said}") as caught:
            feed.take(0)
        assert caught.value.exit_code == 75
        feed.close()


def test_what_is_on_disk_is_used_while_its_teacher_is_away(tmp_path):
    one, two = FakeTeacher(seed=1), FakeTeacher(seed=2)
    store = LabelStore(tmp_path, 1 << 30, lambda message: None)
    by_name = {"one": (0, 1), "two": (0, 1)}
    with serve(one) as first:
        with serve(two) as second:
            feed = open_feed([teacher("two", second.address, two, store=store)], {"two": (0, 1)}, count=2)
            kept = [feed.take(number).ready.by_name["two"] for number in range(2)]
            feed.close()
        teachers = [teacher("one", first.address, one), teacher("two", second.address, two, store=store)]
        feed = open_feed(teachers, by_name, count=3, max_batches=1)
        assert not feed.take(0).ready.missing
        feed.close()
        feed = JoinedFeed(  # the first is not on disk, so that the teacher is known to be away when the others are asked
            [teacher("one", first.address, one), teacher("two", second.address, two, store=store)],
            lambda number: asked((2, 0, 1)[number], by_name), first=0, count=3, max_bytes=1 << 30, max_batches=1,
            prepare=LabelTensors.of, tell=lambda told: None,
        )  # fmt: skip
        assert "two" in feed.take(0).ready.missing
        for number in range(2):
            found = feed.take(number + 1).ready
            assert not found.missing
            np.testing.assert_array_equal(
                found.by_name["two"].labels.named["logits_NV"].numpy(), kept[number].labels.named["logits_NV"].numpy()
            )
        feed.close()


@pytest.mark.parametrize("mistake", ["nan", "truncated", "foreign"])
def test_a_wrong_answer_is_never_a_missing_one(mistake):
    one, two = FakeTeacher(seed=1), FakeTeacher(seed=2, mistake=mistake)
    with serve(one) as first, serve(two) as second:
        teachers = [teacher("one", first.address, one), teacher("two", second.address, two)]
        feed = open_feed(teachers, {"one": (0, 1), "two": (0, 1)})
        with pytest.raises(LabelError) as caught:
            feed.take(0)
        assert "teacher two" in caught.value.__notes__ and any("a:0" in note for note in caught.value.__notes__)
        feed.close()


def test_who_comes_back_as_another_ends_the_run():
    one, two = FakeTeacher(seed=1), FakeTeacher(seed=2)
    with serve(one) as first:
        other = LoopbackServer(two).start()
        teachers = [teacher("one", first.address, one), teacher("two", other.address, two)]
        told = []
        feed = open_feed(teachers, {"one": (0, 1), "two": (1,)}, count=100_000, told=told, max_batches=1)
        feed.take(0)
        other.stop()
        numbers = iter(range(1, 100_000))
        next(number for number in numbers if feed.take(number).ready.missing)
        stranger = LoopbackServer(FakeTeacher(seed=3), port=other.port).start()

        def until_refused():
            for number in numbers:
                feed.take(number)
                time.sleep(0.01)

        with pytest.raises(MismatchError):
            until_refused()
        assert len(told) == 1, "it is not said to be back"
        feed.close()
        stranger.stop()


def test_who_is_waited_for_alone_is_named():
    quick, slow = FakeTeacher(seed=1), FakeTeacher(seed=2, delay_s=0.2)
    with serve(quick) as first, serve(slow) as second:
        teachers = [teacher("quick", first.address, quick), teacher("slow", second.address, slow)]
        feed = open_feed(teachers, {"quick": (0, 1), "slow": (0, 1)}, count=3, max_batches=1)
        for number in range(3):
            feed.take(number)
        feed.close()
    assert 0.3 < feed.stats.alone_s["slow"] <= feed.stats.wait_s
    assert feed.stats.alone_s["quick"] < 0.1 * feed.stats.alone_s["slow"]


def test_ten_teachers_hold_no_thread_while_they_wait():
    """Nine feeds of ten teachers that all wait for room: more than the loop has threads, and still everybody is answered."""
    fakes = {str(number): FakeTeacher(seed=number) for number in range(10)}
    servers = {name: LoopbackServer(fake).start() for name, fake in fakes.items()}
    every = dict.fromkeys(fakes, (0, 1))
    feeds = [
        open_feed([teacher(n, servers[n].address, fakes[n]) for n in fakes], every, count=3, max_batches=1)
        for _ in range(9)
    ]
    for number in range(3):
        for feed in feeds:
            assert set(feed.take(number).ready.by_name) == set(fakes)
    for feed in feeds:
        feed.close()
    for server in servers.values():
        server.stop()
    assert all(fake.calls == 27 for fake in fakes.values())


def test_shares_of_a_sample_sum_to_one_over_those_that_have_answered():
    weights = {"a": 0.6, "b": 0.4, "c": 1.0}
    assert shares(weights, {"a": (0, 1), "b": (1, 2)}, 4) == {"a": [1.0, 0.6, 0.0, 0.0], "b": [0.0, 0.4, 1.0, 0.0]}
    assert shares(weights, {}, 2) == {}


def test_what_is_enough_looks_at_each_sample():
    one = AskedOne((0, 1), request(0))
    every = {"a": one, "b": AskedOne((1,), request(0, (1,)))}
    weights = {"a": 0.7, "b": 0.3}
    assert is_enough(every, ["a"], ["b"], weights)
    assert not is_enough(every, ["b"], ["a"], weights), "nobody else has the first sample"
    both = {"a": one, "b": one}
    assert is_enough(both, ["b"], ["a"], weights), "0.3 is enough"
    assert not is_enough(both, ["b"], ["a"], {"a": 0.701, "b": 0.299})
    assert is_enough(both, ["a", "b"], [], weights)
    assert not is_enough(both, [], ["a", "b"], weights)
