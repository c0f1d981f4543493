"""Quotas over a clock of the test's own: rates met from both sides, and nothing taken by a refusal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_server.config.server import TenantConfig
from teacher_server.edge.admission import BURST_S, Admission
from teacher_wire.core.errors import OverloadedError


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def asked_for(admission, clock, seconds, tokens, tenant="t"):
    """Tokens computed for a tenant that comes back exactly when it is told to."""
    end_s, computed = clock.now_s + seconds, 0
    while clock.now_s < end_s:
        try:
            with admission.computing(tenant, tokens):
                computed += tokens
        except OverloadedError as error:
            clock.now_s += error.retry_after_s + 1e-9
    return computed


@given(rate=st.integers(10, 10**6), share=st.floats(0.001, 0.2))
def test_a_rate_is_kept_and_reached(rate, share):
    clock = Clock()
    admission = Admission(clock)
    admission.configure({"t": TenantConfig(tokens_per_s=rate)})
    tokens = max(1, int(rate * share))
    computed = asked_for(admission, clock, 30.0, tokens)
    assert rate * 30 * 0.95 - tokens <= computed <= rate * (30 + BURST_S) + 2 * tokens + rate * 0.02


def test_a_request_above_the_whole_quota_passes_and_is_paid_for():
    clock = Clock()
    admission = Admission(clock)
    admission.configure({"t": TenantConfig(tokens_per_s=100)})
    with admission.computing("t", 1000):
        pass
    with pytest.raises(OverloadedError) as caught:
        admission.computing("t", 1).__enter__()
    assert caught.value.retry_after_s == pytest.approx((1000 - 100 * BURST_S) / 100)


def test_tokens_in_flight_are_held_while_they_fly():
    admission = Admission(Clock())
    admission.configure({"t": TenantConfig(inflight_tokens=100)})
    with admission.computing("t", 90):
        with pytest.raises(OverloadedError) as caught:
            admission.computing("t", 20).__enter__()
        assert (caught.value.field, caught.value.value, caught.value.limit) == (
            "tenants.t.inflight_tokens",
            "110",
            "100",
        )
        with admission.computing("t", 10), admission.computing("other", 10**6):
            pass
    with admission.computing("t", 500):  # alone, anything passes: it could never otherwise
        pass
    assert admission.counters()["t"]["inflight_tokens"] == 0


def test_bytes_are_a_quota_of_their_own():
    clock = Clock()
    admission = Admission(clock)
    admission.configure({"t": TenantConfig(bytes_per_s=1000)})
    admission.send("t", 800)
    with pytest.raises(OverloadedError) as caught:
        admission.send("t", 1)
    assert caught.value.field == "tenants.t.bytes_per_s"
    clock.now_s += caught.value.retry_after_s + 1e-6
    admission.send("t", 1)
    assert admission.counters()["t"]["sent_bytes"] == 801
    assert admission.counters()["t"]["refused"] == 1


def test_a_reply_that_is_not_made_is_neither_charged_nor_counted():
    admission = Admission(Clock())
    admission.configure({"t": TenantConfig(bytes_per_s=1000)})
    for _ in range(20):
        with pytest.raises(ValueError, match="no answer"), admission.sending("t", 800):
            raise ValueError("no answer")
    assert admission.counters().get("t", {"sent_bytes": 0})["sent_bytes"] == 0
    with admission.sending("t", 800):
        assert admission.counters().get("t", {"sent_bytes": 0})["sent_bytes"] == 0, "it is not there yet"
    assert admission.counters()["t"]["sent_bytes"] == 800
    with pytest.raises(OverloadedError, match="quota"), admission.sending("t", 1):
        pass
    assert admission.counters()["t"]["sent_bytes"] == 800


def test_a_call_of_generate_is_charged_for_what_may_be_written_and_settled_for_what_was():
    clock = Clock()
    admission = Admission(clock)
    admission.configure({"t": TenantConfig(tokens_per_s=100)})
    with admission.writing("t", 1_000_000) as written:
        written.tokens += 10
        with pytest.raises(OverloadedError) as caught:  # a second one beside it
            admission.writing("t", 1_000_000).__enter__()
        assert caught.value.retry_after_s == pytest.approx(30.0)
        written.tokens += 540
        written.whole = True
    with pytest.raises(OverloadedError) as caught:
        admission.computing("t", 1).__enter__()
    assert caught.value.retry_after_s == pytest.approx((550 - 100 * BURST_S) / 100)
    assert admission.counters()["t"]["computed_tokens"] == 550


def test_a_call_of_generate_that_is_taken_back_pays_for_its_time():
    clock = Clock()
    admission = Admission(clock)
    admission.configure({"t": TenantConfig(tokens_per_s=100)})
    for _ in range(20):  # calls for a million tokens, each taken back after a second
        call = admission.writing("t", 1_000_000)
        call.__enter__()
        clock.now_s += 1.0
        call.__exit__(None, None, None)
        clock.now_s += 1e-6
    assert admission._buckets["t", "tokens_per_s"].wait_s(clock.now_s) == 0.0  # and not a day of waiting
    assert admission._buckets["t", "tokens_per_s"].level <= 100 * BURST_S + 1


def test_no_more_calls_of_generate_at_once_than_the_tokens_in_flight():
    admission = Admission(Clock())
    admission.configure({"t": TenantConfig(inflight_tokens=1000)})
    with admission.writing("t", 600), pytest.raises(OverloadedError) as caught:
        admission.writing("t", 600).__enter__()
    assert caught.value.field == "tenants.t.inflight_tokens"
    assert admission.counters()["t"]["inflight_tokens"] == 0


def test_whoever_is_not_listed_has_the_default_on_an_account_of_its_own():
    admission = Admission(Clock())
    admission.configure({"default": TenantConfig(tokens_per_s=10)})
    for tenant in ("", "x", "y"):
        with admission.computing(tenant, 100):
            pass
        with pytest.raises(OverloadedError):
            admission.computing(tenant, 1).__enter__()


def test_setting_the_same_quota_again_gives_nothing_away():
    admission = Admission(Clock())
    tenants = {"t": TenantConfig(tokens_per_s=10)}
    admission.configure(tenants)
    with admission.computing("t", 100):
        pass
    admission.configure(tenants)
    with pytest.raises(OverloadedError):
        admission.computing("t", 1).__enter__()
    admission.configure({})
    with admission.computing("t", 100):
        pass


def test_several_edges_share_a_quota():
    clock = Clock()
    admission = Admission(clock)
    admission.configure({"t": TenantConfig(tokens_per_s=1000)}, edges=4)
    assert asked_for(admission, clock, 30.0, 5) == pytest.approx(250 * 30, rel=0.05)


def test_another_number_of_edges_or_another_rate_refills_no_bucket():
    clock = Clock()
    admission = Admission(clock)
    admission.configure({"t": TenantConfig(tokens_per_s=1000)}, edges=1)
    with admission.computing("t", 5000):
        pass
    for edges in (2, 1, 3, 1):
        admission.configure({"t": TenantConfig(tokens_per_s=1000)}, edges)
        with pytest.raises(OverloadedError), admission.computing("t", 1):
            pass
    admission.configure({"t": TenantConfig(tokens_per_s=900)})
    with pytest.raises(OverloadedError), admission.computing("t", 1):
        pass


def test_edges_that_come_and_go_give_no_more_than_the_rate():
    clock = Clock()
    admission = Admission(clock)
    computed = 0
    for second in range(60):
        admission.configure({"t": TenantConfig(tokens_per_s=1000)}, edges=1 + second % 2)
        computed += asked_for(admission, clock, 1.0, 50)
    assert computed <= 1000 * (60 + BURST_S) + 50 * 60


def test_nothing_is_kept_of_tenants_that_are_gone():
    clock = Clock()
    admission = Admission(clock)
    admission.configure({"listed": TenantConfig(tokens_per_s=10**9)})
    for name in ("listed", *(f"guest-{number}" for number in range(100))):
        with admission.computing(name, 10):
            pass
        admission.send(name, 10)
    clock.now_s += 300
    with admission.computing("guest-1", 10):
        clock.now_s += 400
        admission.configure({"listed": TenantConfig(tokens_per_s=10**9)})
        assert set(admission.counters()) == {"listed", "guest-1"}
