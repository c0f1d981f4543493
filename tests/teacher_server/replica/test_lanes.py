"""The interactive lane of the queue: who goes first, what it costs, and what a tenant that marks everything gains."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_server.replica.score_queue import Batcher, Job


def lanes(**changes):
    return Batcher(**{"max_tokens": 1000, "max_queue_tokens": 10**9, "interactive_tokens": 100, **changes})


def bulk(number, tenant="bulk", tokens=100, **changes):
    return Job(number, tenant, tokens, **changes)


def quick(number, tenant="me", tokens=50, **changes):
    return Job(number, tenant, tokens, interactive=True, **changes)


def ids(batcher, **options):
    return [job.job_id for job in batcher.next_batch(0.0, **options)[0]]


def test_an_interactive_job_is_in_the_next_batch_and_no_bulk_job_with_it():
    batcher = lanes()
    for number in range(50):
        batcher.add(bulk(number))
    batcher.next_batch(0.0)
    batcher.add(quick(100))
    batcher.add(quick(101, "other"))
    assert batcher.queued_interactive() == (100, 2)
    assert sorted(ids(batcher)) == [100, 101]
    assert batcher.queued_interactive() == (0, 0)


def test_interactive_batches_keep_to_their_own_budget():
    batcher = lanes()
    for number in range(5):
        batcher.add(quick(number, f"tenant{number}", tokens=40))
    assert [len(ids(batcher)) for _ in range(3)] == [2, 2, 1]


def test_bulk_batches_are_small_while_interactive_jobs_come_and_large_again_afterwards():
    batcher = lanes()
    for number in range(100):
        batcher.add(bulk(number))
    assert len(ids(batcher)) == 10
    batcher.add(quick(1000))
    assert ids(batcher) == [1000]
    assert len(ids(batcher)) == 1 and batcher.interactive_comes(9.9)
    assert not batcher.interactive_comes(10.1)
    assert len(batcher.next_batch(10.1)[0]) == 10


def test_nothing_of_bulk_begins_behind_another_pass():
    batcher = lanes()
    batcher.add(bulk(0))
    assert ids(batcher, only_interactive=True) == [] and batcher.queued_jobs == 1
    batcher.add(quick(1))
    assert ids(batcher, only_interactive=True) == [1]


def test_a_long_bulk_job_is_cut_between_its_pieces_and_comes_back_in_order():
    batcher = lanes()
    batcher.add(bulk(0, tokens=400, pieces=(60, 40, 150, 90, 60)))
    batcher.add(quick(1))
    assert ids(batcher) == [1]
    found = []
    while batcher.queued_jobs:
        (job,), _ = batcher.next_batch(0.0)
        found.append((job.first, job.pieces, job.tokens))
        assert batcher.queued_tokens == 400 - sum(tokens for _, _, tokens in found)
    assert found == [(0, (60, 40), 100), (2, (150,), 150), (3, (90,), 90), (4, (60,), 60)]


def test_what_is_left_of_a_cut_job_can_be_taken_back():
    batcher = lanes()
    batcher.add(bulk(0, tokens=400, pieces=(100,) * 4, deadline_s=5.0))
    batcher.add(quick(1))
    batcher.next_batch(0.0)
    batcher.next_batch(0.0)
    assert batcher.queued_tokens == 300
    assert [job.tokens for job in batcher.next_batch(6.0)[1]] == [300]
    assert batcher.queued_tokens == batcher.queued_jobs == 0


def test_completions_that_share_a_prompt_are_not_cut():
    batcher = lanes()
    batcher.add(quick(0, tokens=800, pieces=(100,) * 8))
    (job,), _ = batcher.next_batch(0.0)
    assert job.tokens == 800


def test_an_interactive_job_longer_than_a_whole_batch_is_cut():
    batcher = lanes()
    batcher.add(quick(0, tokens=2400, pieces=(400,) * 6))
    batcher.add(quick(1, "other"))
    first, second = batcher.next_batch(0.0)[0], batcher.next_batch(0.0)[0]
    assert [job.tokens for job in first] == [800] and [job.job_id for job in second] == [1]


def shares(flood, victims, rounds=600, weights=None):
    """Tokens served by tenant when each always has jobs waiting; `flood` and `victims` make one, and the service is counted in tokens."""
    batcher = lanes(weights=weights)
    served, number = {}, 0
    makers = {"flood": flood, **victims}
    for name, make in makers.items():
        for _ in range(40):
            batcher.add(make(number, name))
            number += 1
    for _ in range(rounds):
        for job in batcher.next_batch(0.0)[0]:
            served[job.tenant] = served.get(job.tenant, 0) + job.tokens
            batcher.add(makers[job.tenant](number, job.tenant))
            number += 1
    return served


def test_a_tenant_that_marks_everything_interactive_gains_no_share():
    served = shares(quick, {"a": bulk, "b": bulk})
    assert served["flood"] <= served["a"] + 1100 and served["flood"] <= served["b"] + 1100
    assert served["a"] == pytest.approx(served["b"], rel=0.1)


def test_weights_hold_in_the_interactive_lane_too():
    served = shares(quick, {"a": bulk, "b": quick}, weights={"a": 3.0})
    assert served["a"] / served["flood"] == pytest.approx(3, rel=0.15)
    assert served["b"] == pytest.approx(served["flood"], rel=0.1)


def test_large_interactive_jobs_gain_nothing_either():
    def large(number, tenant):
        return quick(number, tenant, tokens=900)

    served = shares(large, {"a": bulk})
    assert served["flood"] == pytest.approx(served["a"], rel=0.1)


def test_behind_a_flood_of_interactive_jobs_an_innocent_one_is_next():
    batcher = lanes()
    for number in range(200):
        batcher.add(quick(number, "flood"))
        batcher.add(bulk(1000 + number))
    for _ in range(30):
        batcher.next_batch(0.0)
    batcher.add(quick(5000))
    assert ids(batcher)[0] == 5000


def test_one_request_at_a_time_cannot_get_around_its_share():
    """Whoever never has two jobs waiting pays for what it had all the same."""
    batcher = lanes()
    for number in range(3000):
        batcher.add(bulk(number))
    served = {"bulk": 0, "me": 0}
    batcher.add(quick(10_000, tokens=90))
    for number in range(500):
        jobs, _ = batcher.next_batch(0.0)
        for job in jobs:
            served[job.tenant] += job.tokens
            if job.tenant == "me":
                batcher.add(quick(10_001 + number, tokens=90))
    assert served["me"] <= served["bulk"] + 1100


def test_of_a_tenants_own_two_lanes_either_gets_half():
    batcher = lanes()
    for number in range(2000):
        batcher.add(quick(2 * number, "one", tokens=50))
        batcher.add(bulk(2 * number + 1, "one", tokens=50))
    served = {True: 0, False: 0}
    for _ in range(400):
        for job in batcher.next_batch(0.0)[0]:
            served[job.interactive] += job.tokens
    assert served[True] == pytest.approx(served[False], abs=1200)


steps_strategy = st.lists(
    st.tuples(
        st.sampled_from(["bulk", "interactive", "cancel", "batch", "only"]),
        st.sampled_from("ab"),
        st.lists(st.integers(1, 70), min_size=1, max_size=5),
    ),
    max_size=60,
)


@given(steps_strategy)
def test_every_piece_leaves_once_and_the_counts_are_those_of_what_waits(steps):
    batcher = lanes(max_tokens=100, interactive_tokens=30)
    left = {}  # job -> pieces that wait

    def take(batch):
        for job in batch:
            assert tuple(left[job.job_id][: len(job.pieces)]) == job.pieces and sum(job.pieces) == job.tokens
            left[job.job_id] = left[job.job_id][len(job.pieces) :]
            if not left[job.job_id]:
                del left[job.job_id]
        assert len(batch) <= 1 or sum(job.tokens for job in batch) <= 100

    for number, (kind, tenant, pieces) in enumerate(steps):
        if kind in ("bulk", "interactive"):
            left[number] = list(pieces)
            batcher.add(Job(number, tenant, sum(pieces), interactive=kind == "interactive", pieces=tuple(pieces)))
        elif kind == "cancel" and left:
            batcher.cancel(victim := min(left))
            del left[victim]
        else:
            take(batcher.next_batch(float(number), only_interactive=kind == "only")[0])
        assert batcher.queued_jobs == len(left)
        assert batcher.queued_tokens == sum(map(sum, left.values())) == sum(batcher.queued_tokens_of().values())
    while batcher.queued_jobs:
        batch, _ = batcher.next_batch(1000.0)
        assert batch, "whoever waits is served"
        take(batch)
    assert not left
