"""The batcher's policy: budgets, order, fairness, expiry; in ints."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_server.replica.score_queue import Batcher, Job
from teacher_wire.core.errors import OverloadedError


def drain(batcher, now_s=0.0):
    batches = []
    while batcher.queued_jobs:
        batch, _ = batcher.next_batch(now_s)
        batches.append(batch)
    return batches


jobs_strategy = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 150)), min_size=1, max_size=40)


@given(jobs_strategy)
def test_every_job_leaves_once_in_its_tenants_order_and_within_the_budget(jobs):
    batcher = Batcher(max_tokens=100, max_queue_tokens=10**9)
    for i, (tenant, tokens) in enumerate(jobs):
        batcher.add(Job(i, tenant, tokens))
    batches = drain(batcher)
    left = [job for batch in batches for job in batch]
    assert sorted(job.job_id for job in left) == list(range(len(jobs)))
    for tenant in "abc":
        ids = [job.job_id for job in left if job.tenant == tenant]
        assert ids == sorted(ids)
    for batch in batches:
        assert len(batch) == 1 or sum(job.tokens for job in batch) <= 100
    assert batcher.queued_tokens == batcher.queued_jobs == 0


def served_tokens(weights, batches=60):
    batcher = Batcher(max_tokens=1000, max_queue_tokens=10**9, weights=weights)
    for i in range(4000):
        batcher.add(Job(2 * i, "a", 37))
        batcher.add(Job(2 * i + 1, "b", 111))
    served = {"a": 0, "b": 0}
    for _ in range(batches):
        for job in batcher.next_batch(0.0)[0]:
            served[job.tenant] += job.tokens
    return served


def test_tenants_share_by_tokens_not_by_requests():
    served = served_tokens({})
    assert served["a"] == pytest.approx(served["b"], rel=0.05)


def test_weights_are_shares_of_tokens():
    served = served_tokens({"a": 3.0, "b": 1.0})
    assert served["a"] / served["b"] == pytest.approx(3, rel=0.1)


def test_a_flood_does_not_delay_a_newcomer_beyond_a_batch():
    batcher = Batcher(max_tokens=1000, max_queue_tokens=10**9)
    for i in range(1000):
        batcher.add(Job(i, "flood", 100))
    batcher.next_batch(0.0)
    batcher.add(Job(5000, "newcomer", 100))
    assert 5000 in [job.job_id for _ in range(2) for job in batcher.next_batch(0.0)[0]]


def test_a_newcomer_is_next_and_whoever_comes_back_has_paid():
    batcher = Batcher(max_tokens=100, max_queue_tokens=10**9)
    for i in range(100):
        batcher.add(Job(i, "flood", 100))
    batcher.next_batch(0.0)
    served = []
    for number in range(20):  # one request at a time, the next when the last is answered
        batcher.add(Job(1000 + number, "guest", 100))
        while True:
            (job,), _ = batcher.next_batch(0.0)
            served.append(job.tenant)
            if job.tenant == "guest":
                break
    assert served[0] == "guest"
    assert served.count("flood") == pytest.approx(20, abs=1)


def test_large_requests_of_a_guest_are_paid_for_before_it_is_served_again():
    batcher = Batcher(max_tokens=100, max_queue_tokens=10**9)
    for i in range(1000):
        batcher.add(Job(i, "flood", 100))
    tokens = {"flood": 0, "guest": 0}
    for number in range(20):
        batcher.add(Job(10_000 + number, "guest", 1000))
        while True:
            (job,), _ = batcher.next_batch(0.0)
            tokens[job.tenant] += job.tokens
            if job.tenant == "guest":
                break
    assert tokens["flood"] == pytest.approx(tokens["guest"], rel=0.1)


def test_an_hour_alone_is_not_held_against_anyone():
    batcher = Batcher(max_tokens=100, max_queue_tokens=10**9)
    for i in range(1000):
        batcher.add(Job(i, "early", 100))
        batcher.next_batch(0.0)
    for i in range(100):
        batcher.add(Job(2000 + 2 * i, "early", 100))
        batcher.add(Job(2001 + 2 * i, "late", 100))
    served = [batcher.next_batch(0.0)[0][0].tenant for _ in range(20)]
    assert served.count("early") == 10


def test_expired_and_cancelled_jobs_get_no_forward_pass():
    batcher = Batcher(max_tokens=100, max_queue_tokens=1000)
    batcher.add(Job(1, "a", 10, deadline_s=5.0))
    batcher.add(Job(2, "a", 10))
    batcher.add(Job(3, "a", 10))
    batcher.cancel(3)
    batch, expired = batcher.next_batch(now_s=6.0)
    assert [job.job_id for job in batch] == [2]
    assert [job.job_id for job in expired] == [1]
    assert batcher.queued_tokens == 0


def test_a_full_queue_refuses_with_a_delay_and_forgets_nothing():
    batcher = Batcher(max_tokens=100, max_queue_tokens=150)
    batcher.add(Job(1, "a", 200))  # an empty queue takes any single job
    with pytest.raises(OverloadedError) as caught:
        batcher.add(Job(2, "a", 1))
    assert caught.value.retry_after_s > 0
    assert [[job.job_id for job in batch] for batch in drain(batcher)] == [[1]]


def test_a_flood_fills_only_its_share_of_the_queue():
    batcher = Batcher(max_tokens=100, max_queue_tokens=1000, weights={"vip": 3.0})
    for i in range(10):
        batcher.add(Job(i, "flood", 100))
    with pytest.raises(OverloadedError):
        batcher.add(Job(10, "flood", 100))
    for i in range(20, 27):  # three quarters of the queue are the newcomer's, however full it is
        batcher.add(Job(i, "vip", 100))
    with pytest.raises(OverloadedError) as caught:
        batcher.add(Job(27, "vip", 100))
    assert caught.value.limit == "750"


def test_many_tenants_together_stay_below_twice_the_queue():
    batcher = Batcher(max_tokens=100, max_queue_tokens=1000)
    refused = 0
    for i in range(500):
        try:
            batcher.add(Job(i, f"tenant{i}", 100))
        except OverloadedError:
            refused += 1
    assert batcher.queued_tokens <= 2 * 1000 + 100
    assert refused


def test_the_delay_of_a_refusal_is_the_time_until_there_is_room():
    batcher = Batcher(max_tokens=100, max_queue_tokens=1000)
    batcher.tokens_per_s = 400.0
    batcher.add(Job(0, "a", 1000))
    with pytest.raises(OverloadedError) as caught:
        batcher.add(Job(1, "a", 200))
    assert caught.value.retry_after_s == pytest.approx(0.5)


@given(st.lists(st.tuples(st.sampled_from(["add", "cancel", "batch"]), st.integers(0, 30)), max_size=80))
def test_the_counts_are_those_of_the_jobs_that_wait(steps):
    batcher = Batcher(max_tokens=100, max_queue_tokens=10**9)
    waiting = {}
    for number, (kind, value) in enumerate(steps):
        if kind == "add":
            waiting[number] = Job(number, "ab"[value % 2], value + 1, deadline_s=float(number + value))
            batcher.add(waiting[number])
        elif kind == "cancel":
            waiting.pop(value, None)
            batcher.cancel(value)
        else:
            batch, expired = batcher.next_batch(float(number))
            assert all(job.deadline_s <= number for job in expired)
            for job in (*batch, *expired):
                assert waiting.pop(job.job_id) == job
        assert batcher.queued_jobs == len(waiting)
        assert batcher.queued_tokens == sum(job.tokens for job in waiting.values())
        assert sum(batcher.queued_tokens_of().values()) == batcher.queued_tokens


def test_deadlines_of_jobs_that_have_ended_are_forgotten():
    batcher = Batcher(100, 10_000)
    batcher.add(Job(0, "other", 1, 1e9))
    for number in range(1, 10_000):
        batcher.add(Job(number, "t", 1, 1e9))
        if number % 2:
            batcher.cancel(number)
        else:
            batcher.next_batch(0.0)
            batcher.add(Job(0, "other", 1, 1e9))
    assert len(batcher._deadlines) < 200
    assert sum(len(tenant.bulk.queue) for tenant in batcher._tenants.values()) < 200
    assert [job.job_id for job in batcher.next_batch(2e9)[1]] == [0]
